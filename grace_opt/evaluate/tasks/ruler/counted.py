"""RULER's aggregation: the words of a list, or of a coded text, that appear most often."""

from __future__ import annotations

from functools import partial

import numpy as np

from grace_opt.evaluate.tasks.base import Question
from grace_opt.evaluate.tasks.haystack import compound, compounds, distinct, letters, words

COMMON = 10  #: words of a list that appear more often
LEAST_WORDS = COMMON + 1
LEAST_CODED = 74  # from here on the fourth rank appears more often than the fifth
SHORT = 4096  #: tokens; shorter lists repeat words less often
ZETA_2 = np.pi**2 / 6


def common_words(rng: np.random.Generator, amount: int, length: int) -> tuple[str, Question]:
    """A numbered list of ``amount`` words, ten of which appear more often; a solved example comes first."""
    if length < SHORT:
        example, found = _listed(rng, 20, 3, 1)
        listed, common = _listed(rng, amount, 6, 1)
    else:
        example, found = _listed(rng, 40, 10, 3)
        listed, common = _listed(rng, amount, 30, 3)
    begin = "Below is a numbered list of words, some of which appear more often than others. Keep those in mind.\n"
    question = f"\nQuestion: Which {COMMON} words appear most often in the list above?"
    prefix = f" Answer: The {COMMON} words that appear most often in the list are:"
    context = f"{begin}{example}{question}{prefix} {_numbered(found)}\n{begin}{listed}"
    return context, Question(question, tuple(common), 120, prefix)


def frequent_words(rng: np.random.Generator, amount: int, length: int) -> tuple[str, Question]:
    """A text of about ``amount`` coded words by Zipf's law with exponent 2.

    The most frequent is noise, the next three are asked for. The vocabulary grows with ``length``, in tokens.
    """
    new_tokens = 50
    vocabulary = distinct(partial(letters, rng, 6), max(5, (length - new_tokens) // 50))
    vocabulary[0] = "..."
    counts = (amount * np.arange(1, len(vocabulary) + 1) ** -2.0 / ZETA_2).astype(int)
    text = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
    shuffled = " ".join(text[at] for at in rng.permutation(len(text)))
    question = (
        "\nQuestion: Leave the dots '...' aside. Which three words appear most often in the coded text above? "
        "Do not explain."
    )
    prefix = " Answer: The three words that appear most often in the coded text above are:"
    context = f"Read the coded text below and keep count of how often each coded word appears. {shuffled}"
    return context, Question(question, tuple(vocabulary[1:4]), new_tokens, prefix)


def _listed(rng: np.random.Generator, amount: int, often: int, seldom: int) -> tuple[str, list[str]]:
    pool = [each for kind in ("adjectives", "nouns", "verbs") for each in words(kind)]
    drawn = [pool[at] for at in rng.permutation(len(pool))[:amount]]
    common = drawn[:COMMON]

    def unlike() -> str:
        word = compound(int(rng.integers(compounds())))
        return unlike() if set(word.split("-")) & set(common) else word

    # Compounds are RULER's second list, for lengths that need more words; none names a common word by the way.
    drawn += distinct(unlike, amount - len(drawn))
    every = common * often + drawn[COMMON:] * seldom
    return _numbered([every[at] for at in rng.permutation(len(every))]), common


def _numbered(listed: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(listed, start=1))
