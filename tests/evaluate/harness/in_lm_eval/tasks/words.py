"""Documents of words that the tiny tokenizer knows, of every length; no network."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset

LENGTHS = (60, 4, 90, 60, 20, 75)


def _words(rng: np.random.Generator, count: int) -> str:
    return " ".join(f"w{number}" for number in rng.integers(4, 99, count))


def documents(**_: Any) -> dict[str, Dataset]:
    rng = np.random.default_rng(0)
    rows = [
        {
            "context": _words(rng, length),
            "choices": [_words(rng, count) for count in (1, 3, 2, 1)],
            "answer": int(rng.integers(4)),
        }
        for length in LENGTHS
    ]
    return {"test": Dataset.from_list(rows)}
