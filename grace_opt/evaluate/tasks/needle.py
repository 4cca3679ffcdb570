"""Needle in a haystack: a number hidden in real text, asked for at the end; or several, each asked for on its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from grace_opt.errors import InputError
from grace_opt.evaluate.tasks.base import Family, Prompt, Question
from grace_opt.evaluate.tasks.filling import fill, stream
from grace_opt.evaluate.tasks.haystack import Haystack, hide, laid_out_text
from grace_opt.models.texts import bos_of

# Chosen on SmolLM2-135M-Instruct; a base model completes the last sentence just as well.
NEEDLE = " The secret number of the vault is {}. Remember it."
QUESTION = "\n\nQuestion: What is the secret number of the vault?\nAnswer: The secret number of the vault is"
ANSWER_TOKENS = 10  # enough for five digits by any tokenizer, and to see that no sixth follows
DEPTHS = (0.5, 0.1, 0.9, 0.3, 0.7)  #: of the words, by the number of a prompt
VAULTS = ("red", "green", "white", "silver")


class Needle(Family):
    """One number, at each depth in turn, or one of each of four vaults, which are four questions on one context.

    ``local``: the text that they are hidden in.
    """

    name = "needle"
    tasks = ("needle/single", "needle/multi")
    differs = (
        "Our own test, after Kamradt's needle in a haystack: a number of five digits in Python's documentation, scored "
        "by that number instead of by a judge."
    )

    @cached_property
    def text(self) -> Haystack:
        """What needles are hidden in."""
        return laid_out_text(self.local)

    def prompts(
        self, task: str, tokenizer: Any, length: int, count: int, *, seed: int = 0, chat: bool = False
    ) -> list[Prompt]:
        vaults = VAULTS if task == "needle/multi" else ("",)

        def prompt(number: int, words: int) -> Prompt:
            rng = stream(seed, task, length, number)
            depths = (
                sorted(rng.permutation(DEPTHS)[: len(vaults)]) if len(vaults) > 1 else [DEPTHS[number % len(DEPTHS)]]
            )
            answers = [str(each) for each in 10_000 + rng.choice(90_000, size=len(vaults), replace=False)]
            order = [vaults[each] for each in rng.permutation(len(vaults))]
            context = _hidden(self.text.stretch(int(rng.integers(len(self.text))), words), order, answers, depths)
            asked = dict(zip(order, answers, strict=True))
            questions = tuple(_question(vault, asked[vault]) for vault in vaults)
            place = {"depth": float(depths[0])} if len(vaults) == 1 else {}
            return Prompt(task, number, length, context, questions, place)

        return fill([partial(prompt, number) for number in range(count)], tokenizer, length, chat)

    def score(self, task: str, question: Question, text: str) -> float:
        """1 if the number stands in the text, as one of its own."""
        return float(found(text, question.answers[0]))


def _hidden(words: list[str], vaults: Sequence[str], answers: Sequence[str], depths: Sequence[float]) -> str:
    needles = [_of(vault, NEEDLE).format(answer).strip() for vault, answer in zip(vaults, answers, strict=True)]
    return hide(words, needles, [_last_end(words, round(depth * len(words))) for depth in depths])


def _last_end(words: Sequence[str], before: int) -> int:
    """Where the last sentence ends, up to so many words; these, if none ends within 100."""
    for place in range(before, max(0, before - 100), -1):
        if words[place - 1].rstrip().endswith((".", "!", "?")):
            return place
    return before


def _question(vault: str, answer: str) -> Question:
    text, prefix = re.split(r"(?=\nAnswer:)", _of(vault, QUESTION))
    return Question(text, (answer,), ANSWER_TOKENS, prefix)


def _of(vault: str, text: str) -> str:
    return text.replace("the vault", f"the {vault} vault") if vault else text


@dataclass(frozen=True)
class NeedlePrompt:
    """``length`` token ids that hide ``answer``, five digits, at ``depth`` (0 the beginning, 1 the end)."""

    ids: list[int]
    answer: str
    length: int
    depth: float


def check_needles(lengths: Sequence[int], depths: Sequence[float]) -> None:
    """Raise InputError for lengths and depths that no text could have."""
    for length in lengths:
        if length < 1:
            raise InputError(f"a needle prompt must have at least 1 token, got {length}")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise InputError(f"depth {depth} is outside the text; give depths from 0 to 1")


def needle_prompts(
    haystack: Sequence[int],
    tokenizer: Any,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    seed: int = 0,
    repeats: int = 1,
) -> list[NeedlePrompt]:
    """``repeats`` prompts for every length and depth, by length, then depth, each of exactly ``length`` tokens.

    ``haystack`` holds the token ids of a text, without special tokens. A prompt is the tokenizer's BOS if it uses
    one, a stretch of the haystack from a random place, the needle in it after the last end of a sentence before
    ``depth`` of the stretch, and the beginning of an answer that the model completes. Number and place depend on
    (seed, length, depth, repeat) only, so a prompt stays the same when others are asked for beside it.
    Raises InputError if a depth is outside [0, 1], a length leaves no room for text, or the haystack is too short.
    """
    bos, question = bos_of(tokenizer), _ids(tokenizer, QUESTION)
    prompts = []
    check_needles(lengths, depths)
    for length in lengths:
        for depth in depths:
            for repeat in range(repeats):
                rng = np.random.default_rng((seed, length, round(1e6 * depth), repeat))
                answer = str(rng.integers(10_000, 100_000))
                needle = _ids(tokenizer, NEEDLE.format(answer))
                room = length - len(bos) - len(needle) - len(question)
                if room < 1:
                    least = length - room + 1
                    raise InputError(
                        f"{length} tokens hold no needle and its question; use lengths of at least {least}"
                    )
                if room > len(haystack):
                    raise InputError(
                        f"the haystack has {len(haystack)} tokens and {length} need {room}; "
                        "give a longer text or smaller lengths"
                    )
                start = int(rng.integers(len(haystack) - room + 1))
                text = list(haystack[start : start + room])
                place = _sentence_end(text, round(depth * room), tokenizer)
                ids = bos + text[:place] + needle + text[place:] + question
                prompts.append(NeedlePrompt(ids, answer, length, depth))
    return prompts


def found(answer_text: str, answer: str) -> bool:
    """Whether ``answer`` stands in what the model wrote, as a number of its own ("48,213" is 48213 too)."""
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", answer_text)
    return re.search(rf"(?<!\d){re.escape(answer)}(?!\d)", plain) is not None


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _sentence_end(ids: list[int], before: int, tokenizer: Any) -> int:
    """The last place up to ``before`` where a sentence ends; ``before`` itself if none is within 100 tokens."""
    for place in range(before, max(0, before - 100), -1):
        if tokenizer.decode(ids[place - 1 : place]).rstrip().endswith((".", "!", "?")):
            return place
    return before
