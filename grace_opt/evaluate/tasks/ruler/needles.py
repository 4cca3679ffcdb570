"""RULER's needles: values of keys, hidden in filler, in running text or among other needles."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from grace_opt.evaluate.tasks.base import Question
from grace_opt.evaluate.tasks.haystack import NOISE, Haystack, compound, compounds, distinct, hide, sentence_ends

Kind = Literal["word", "number", "uuid"]
NEW_TOKENS = 128
DEPTHS = np.round(np.linspace(0, 100, num=40)).astype(int)  #: percent of the sentences


@dataclass(frozen=True)
class Needles:
    """What is hidden where, and what is asked for.

    Attributes:
        haystack: lines of ``noise``, running ``text``, or other ``needles``.
        key, value: what keys and values are.
        keys, values: how many keys there are, and how many values each has.
        queries: how many keys are asked for.
    """

    haystack: Literal["noise", "text", "needles"]
    key: Kind = "word"
    value: Kind = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def make(self, rng: np.random.Generator, amount: int, text: Haystack | None) -> tuple[str, Question]:
        """Context and question; ``amount``: words of the text, or lines."""
        key, value = partial(DRAWS[self.key], rng), partial(DRAWS[self.value], rng)
        keys = distinct(key, self.keys)
        values = distinct(value, self.keys * self.values)
        owners = [each for each in keys for _ in range(self.values)]
        needles = [self._needle(*pair) for pair in zip(owners, values, strict=True)]
        needles = [needles[at] for at in rng.permutation(len(needles))]
        asked = rng.choice(self.keys, size=self.queries, replace=False)
        answers = [each for at in asked for each in values[at * self.values : (at + 1) * self.values]]
        if text is not None:
            hidden = _in_text(rng, needles, text, amount)
        elif self.haystack == "noise":
            hidden = _among(rng, needles, [NOISE] * amount)
        else:
            others = zip(distinct(key, amount, keys), distinct(value, amount, values), strict=True)
            hidden = _among(rng, needles, [self._needle(*pair) for pair in others])
        return self._asked(hidden, [keys[at] for at in asked], tuple(answers))

    def _needle(self, key: str, value: str) -> str:
        return f"A special {self.value} for {key} is: {value}."

    def _asked(self, hidden: str, keys: list[str], answers: tuple[str, ...]) -> tuple[str, Question]:
        of = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
        if len(answers) == 1:
            begin = (
                f"The text below hides a special {self.value}. Keep it in mind; you will be asked for it afterwards."
            )
            text = f"\nWhat is the special {self.value} for {of} in the text above?"
            prefix = f" The special {self.value} for {of} in the text above is"
        else:
            begin = (
                f"The text below hides special {self.value}s. Keep them in mind; you will be asked for them afterwards."
            )
            text = f"\nWhat are all the special {self.value}s for {of} in the text above?"
            prefix = f" The special {self.value}s for {of} in the text above are"
        return f"{begin}\n{hidden}", Question(text, answers, NEW_TOKENS, prefix)


def _in_text(rng: np.random.Generator, needles: list[str], text: Haystack, amount: int) -> str:
    """After different ones of 40 depths, in percent of the sentences."""
    words = text.stretch(int(rng.integers(len(text))), amount)
    starts = [0, *sentence_ends(words)]
    depths = np.sort(rng.choice(DEPTHS, size=len(needles), replace=False))
    return hide(words, needles, [starts[int((len(starts) - 1) * depth / 100)] for depth in depths])


def _among(rng: np.random.Generator, needles: list[str], lines: list[str]) -> str:
    """Each before another one of the lines."""
    for place, needle in zip(
        sorted(rng.choice(len(lines), size=len(needles), replace=False), reverse=True), needles, strict=True
    ):
        lines.insert(place, needle)
    return "\n".join(lines)


def _word(rng: np.random.Generator) -> str:
    return compound(int(rng.integers(compounds())))


def _number(rng: np.random.Generator) -> str:
    return str(rng.integers(10**6, 10**7))


def _uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


DRAWS: dict[Kind, Callable[[np.random.Generator], str]] = {"word": _word, "number": _number, "uuid": _uuid}
