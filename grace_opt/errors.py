"""The one exception that a user can cause: the command line prints it as a sentence and exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 1200  #: characters of a message: names in it may come from a file, which may have any length


class InputError(ValueError):
    """Bad input. The message is one sentence that names the thing and the cure, safe to be shown anywhere (`shown`)."""

    def __init__(self, message: object = "") -> None:
        text = str(message)
        super().__init__(shown(text if text.isprintable() else " ".join(text.split())))


def shown(text: str, longest: int = LONGEST) -> str:
    """Text of somebody else, such as the name of a file: without what a terminal or an encoder stumbles over.

    Control characters, which move the cursor, set colours or turn the direction of writing, and bytes that are no UTF-8
    become escapes like \\x1b; the middle of a long text is left out.
    """
    if len(text) > longest:
        half = (longest - 3) // 2
        text = f"{text[:half]}...{text[-half:]}"
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error sentence: the nearest known name, and what is known."""
    known = sorted(known)
    match = difflib.get_close_matches(word[:100], known, n=1)
    hint = f"; did you mean {match[0]!r}?" if match else ";"
    return f"{hint} known: {', '.join(known) or 'none'}"
