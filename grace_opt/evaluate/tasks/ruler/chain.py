"""RULER's variable tracking: one chain of assignments among lines of filler, after a worked example."""

from __future__ import annotations

import string
from functools import partial

import numpy as np

from grace_opt.evaluate.tasks.base import Question
from grace_opt.evaluate.tasks.haystack import NOISE, distinct, letters

HOPS = 4
NEW_TOKENS = 30
LEAST_LINES = HOPS + 1
EXAMPLE_LINES = 13  # with them the example has below 500 tokens, as published
BEGIN = "Below, a chain of variable assignments is hidden among other lines. Read it and keep track of it.\n\n"


def variable_tracking(rng: np.random.Generator, lines: int) -> tuple[str, Question]:
    """Five variables hold one number, the first by assignment, each other from the one before it.

    ``lines``: of filler. A solved example with shorter names comes first.
    """
    hidden, question = _chain(rng, 3, EXAMPLE_LINES)
    example = f"{BEGIN}{hidden}{question.text}{question.prefix} {' '.join(question.answers)}\n\n"
    hidden, question = _chain(rng, 5, lines)
    return f"{example}{BEGIN}{hidden}", question


def _chain(rng: np.random.Generator, size: int, lines: int) -> tuple[str, Question]:
    names = distinct(partial(letters, rng, size, string.ascii_uppercase), HOPS + 1)
    number = str(rng.integers(10_000, 99_999))
    held = (number, *(f"VAR {name}" for name in names))
    text = [NOISE] * lines
    places = np.sort(rng.choice(lines, size=len(names), replace=False))
    for before, (place, name, value) in enumerate(zip(places, names, held[: len(names)], strict=True)):
        text.insert(place + before, f"VAR {name} = {value}")
    asked = f"\nQuestion: Which variables hold the value {number} in the text above?"
    prefix = f" Answer: By the assignments in the text above, {len(names)} variables hold the value {number}, namely:"
    return "\n".join(text), Question(asked, tuple(names), NEW_TOKENS, prefix)
