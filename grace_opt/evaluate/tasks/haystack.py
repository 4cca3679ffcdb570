"""What needles are hidden in: running text, a line of filler, and lists of words."""

from __future__ import annotations

import json
import os
import re
import string
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np

from grace_opt.errors import InputError
from grace_opt.evaluate.documents import read_documents
from grace_opt.models.texts import prose

#: a line of filler that says nothing
NOISE = "The river is wide. The road is long. The night is cold. We walk on. Nobody is in a hurry."


class Haystack:
    """A text as its words, each with the white space after it; at the end it begins again."""

    def __init__(self, text: str) -> None:
        self._words = re.findall(r"\S+\s*", text)
        if not self._words:
            raise InputError("there is no text to hide anything in; give a text that has words")

    def __len__(self) -> int:
        return len(self._words)

    def stretch(self, start: int, words: int) -> list[str]:
        """So many words from a place on."""
        own = self._words
        rounds = (start + words) // len(own) + 1
        return (own * rounds)[start : start + words]


def running_text(local: str | None) -> Haystack:
    """The text of a source, in one line; by default prose of Python's own documentation, which calibration never reads.

    ``local``: a source of `read_documents`; a folder without .txt files or a .json file holds other data of a task, not
    a text.
    """
    text = "".join(prose()) if _holds_no_text(local) else _joined(local)
    return Haystack(re.sub(r"\s+", " ", text))


def laid_out_text(local: str | None) -> Haystack:
    """The text of a source as it is laid out; by default the topics of Python's own documentation."""
    return Haystack(_joined(None if _holds_no_text(local) else local))


def _holds_no_text(local: str | None) -> bool:
    if local is None or local.endswith(".json"):
        return True
    return os.path.isdir(local) and not any(Path(local).glob("*.txt"))


def _joined(local: str | None) -> str:
    return "\n\n".join(document.text for document in read_documents(local)[:20])


def sentence_ends(words: Sequence[str]) -> list[int]:
    """After how many words each sentence ends, the last one with the text."""
    ends = [at for at, word in enumerate(words, start=1) if word.rstrip().endswith((".", "!", "?"))]
    return ends if ends[-1:] == [len(words)] else [*ends, len(words)]


def hide(words: Sequence[str], needles: Sequence[str], places: Sequence[int]) -> str:
    """The text with each needle after so many words; ``places`` ascend."""
    parts, last = [], 0
    for needle, place in zip(needles, places, strict=True):
        parts += ["".join(words[last:place]).rstrip(), needle]
        last = place
    return " ".join(part for part in (*parts, "".join(words[last:]).strip()) if part)


@cache
def words(kind: str) -> tuple[str, ...]:
    """The packaged ``adjectives``, ``nouns`` or ``verbs``; no word is part of another one."""
    text = resources.files("grace_opt.evaluate.tasks").joinpath("data", "words.json").read_text(encoding="utf-8")
    return tuple(json.loads(text)[kind])


def compound(number: int) -> str:
    """One of `compounds` words such as ``amber-river``."""
    nouns = words("nouns")
    return f"{words('adjectives')[number // len(nouns)]}-{nouns[number % len(nouns)]}"


def compounds() -> int:
    """How many there are."""
    return len(words("adjectives")) * len(words("nouns"))


def letters(rng: np.random.Generator, count: int, alphabet: str = string.ascii_lowercase) -> str:
    """A random word."""
    return "".join(alphabet[each] for each in rng.integers(len(alphabet), size=count))


def distinct(draw: Callable[[], str], count: int, taken: Iterable[str] = ()) -> list[str]:
    """So many draws that differ, and are not ``taken``."""
    known = set(taken)
    found: list[str] = []
    while len(found) < count:
        each = draw()
        if each not in known:
            known.add(each)
            found.append(each)
    return found
