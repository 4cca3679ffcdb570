"""The one exception that a user can cause: the command line prints it as a sentence and exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input. The message is one sentence that names the thing and the cure."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error sentence: the nearest known name, and what is known."""
    known = sorted(known)
    match = difflib.get_close_matches(word, known, n=1)
    hint = f"; did you mean {match[0]!r}?" if match else ";"
    return f"{hint} known: {', '.join(known) or 'none'}"
