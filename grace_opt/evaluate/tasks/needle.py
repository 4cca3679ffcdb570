"""Needle in a haystack: a number hidden in real text, asked for at the end; or several, each asked for on its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

from grace_opt.evaluate.tasks.base import Family, Prompt, Question
from grace_opt.evaluate.tasks.filling import fill, stream
from grace_opt.evaluate.tasks.haystack import Haystack, hide, laid_out_text

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


def found(answer_text: str, answer: str) -> bool:
    """Whether ``answer`` stands in what the model wrote, as a number of its own ("48,213" is 48213 too)."""
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", answer_text)
    return re.search(rf"(?<!\d){re.escape(answer)}(?!\d)", plain) is not None
