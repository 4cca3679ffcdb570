"""Prompts of a length: as much haystack as it holds, and one stream of random numbers for each prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from grace_opt.errors import InputError
from grace_opt.evaluate.tasks.base import Prompt, Question, rendered

#: a prompt with so much haystack, the same one whenever it is asked for
Maker = Callable[[int], Prompt]


def stream(seed: int, task: str, length: int, number: int) -> np.random.Generator:
    """The random numbers of a prompt: the same in every process, whatever other prompts are made beside it."""
    digest = hashlib.sha256(task.encode()).digest()
    return np.random.default_rng((seed, int.from_bytes(digest[:8], "big"), length, number))


def size(prompt: Prompt, tokenizer: Any, chat: bool) -> int:
    """The tokens of a prompt with the longest of its questions, the template, and what is generated."""

    def with_question(prompt: Prompt, question: Question) -> int:
        ids = rendered(prompt, question, "context-only", tokenizer, chat)
        return len(ids.compressed) + len(ids.following) + question.new_tokens

    bare = replace(prompt, context="")  # the context is long, so it is read once
    return with_question(prompt, max(prompt.questions, key=lambda question: with_question(bare, question)))


def fill(makers: Sequence[Maker], tokenizer: Any, length: int, chat: bool, least: int = 1) -> list[Prompt]:
    """Each maker's prompt with the most haystack that ``length`` tokens hold, never less than ``least``.

    Raises InputError, with the least length that would do, if one does not hold that.
    """
    smallest = [make(least) for make in makers]
    need = max((size(prompt, tokenizer, chat) for prompt in smallest), default=0)
    if need > length:
        raise InputError(f"{smallest[0].task} needs prompts of at least {need} tokens, got a length of {length}")
    found = []
    for make in makers:

        def tokens(amount: int, make: Maker = make) -> int:
            return size(make(amount), tokenizer, chat)

        found.append(make(_most(tokens, length, least)))
    return found


def _most(tokens: Callable[[int], int], length: int, least: int) -> int:
    """An amount of at most ``length`` tokens where one more has more; ``least`` has no more.

    Tokens grow nearly in proportion, so between two amounts the place is guessed; each third step halves what is left.
    """
    low, low_tokens = least, tokens(least)
    high = least + 1
    while (high_tokens := tokens(high)) <= length:
        low, low_tokens = high, high_tokens
        high += high - least
    step = 0
    while high - low > 1:
        step += 1
        share = 0.5 if step % 3 == 0 else (length - low_tokens) / (high_tokens - low_tokens)
        middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
        if (middle_tokens := tokens(middle)) <= length:
            low, low_tokens = middle, middle_tokens
        else:
            high, high_tokens = middle, middle_tokens
    return low
