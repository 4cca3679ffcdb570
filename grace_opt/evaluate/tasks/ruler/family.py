"""RULER's thirteen tasks, by the published rules on a packaged haystack and packaged words.

Generators and scores follow NVIDIA/RULER (commit c3f5e3b): kinds and numbers of needles, hops, counts, worked examples,
answer prefixes, tokens to generate. What differs is `Ruler.differs`: scores compare methods, not published tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np

from grace_opt.errors import InputError
from grace_opt.evaluate.tasks.base import Family, Prompt, Question
from grace_opt.evaluate.tasks.filling import fill, stream
from grace_opt.evaluate.tasks.haystack import Haystack, running_text
from grace_opt.evaluate.tasks.ruler.chain import LEAST_LINES, variable_tracking
from grace_opt.evaluate.tasks.ruler.counted import LEAST_CODED, LEAST_WORDS, common_words, frequent_words
from grace_opt.evaluate.tasks.ruler.needles import Needles
from grace_opt.evaluate.tasks.ruler.reading import LEAST_DOCUMENTS, Reading

NEEDLES: Mapping[str, Needles] = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("text"),
    "niah_single_3": Needles("text", value="uuid"),
    "niah_multikey_1": Needles("text", keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", key="uuid", value="uuid"),
    "niah_multivalue": Needles("text", values=4),
    "niah_multiquery": Needles("text", keys=4, queries=4),
}
COUNTED = {"cwe": LEAST_WORDS, "fwe": LEAST_CODED}
READING = {"qa_1": "squad.json", "qa_2": "hotpotqa.json"}
_CONTROL = re.compile(r"[\x00-\x1f]")


class Ruler(Family):
    """``local``: a text for the haystack, or a folder with squad.json, hotpotqa.json or .txt files of the haystack."""

    name = "ruler"
    tasks = tuple(f"ruler/{task}" for task in (*NEEDLES, "vt", *COUNTED, *READING))
    grows = True  # a string that is contained stays contained
    differs = (
        "Not comparable with published RULER: the wording of prompts, the line of filler and the words are our own; "
        "the haystack is prose of the running Python's documentation, from a random place for each prompt, instead "
        "of essays; sentences end at . ! ?; lengths are filled to one word, line or document, not in steps; keys "
        "and values differ from each other; the worked example of vt has 13 lines of filler; needles, words and "
        "documents are shuffled anew for each prompt, and questions drawn at random; long lists go on with "
        "compounds. The chat template is the tokenizer's own, or none."
    )

    @cached_property
    def text(self) -> Haystack:
        """What needles are hidden in."""
        return running_text(self.local)

    @property
    def at_hand(self) -> tuple[str, ...]:
        missing = {f"ruler/{task}" for task, file in READING.items() if not Reading.found(self.local, file)}
        return tuple(task for task in self.tasks if task not in missing)

    def prompts(
        self, task: str, tokenizer: Any, length: int, count: int, *, seed: int = 0, chat: bool = False
    ) -> list[Prompt]:
        make, least = self._maker(task.removeprefix("ruler/"), length, seed)

        def prompt(number: int, amount: int) -> Prompt:
            context, question = make(stream(seed, task, length, number), number, amount)
            return Prompt(task, number, length, context, (question,))

        return fill([partial(prompt, number) for number in range(count)], tokenizer, length, chat, least)

    def score(self, task: str, question: Question, text: str) -> float:
        """The share of the answers that the text contains; for question answering, whether it contains one."""
        answer = _CONTROL.sub("\n", text.strip()).strip().lower()
        contained = [each.lower() in answer for each in question.answers]
        return float(any(contained)) if task.removeprefix("ruler/") in READING else sum(contained) / len(contained)

    def _maker(
        self, task: str, length: int, seed: int
    ) -> tuple[Callable[[np.random.Generator, int, int], tuple[str, Question]], int]:
        """(random numbers, number of the prompt, amount of haystack) -> context and question; the least amount."""
        if task in NEEDLES:
            needles = NEEDLES[task]
            text = self.text if needles.haystack == "text" else None
            return lambda rng, _, amount: needles.make(rng, amount, text), 1
        if task == "vt":
            return lambda rng, _, amount: variable_tracking(rng, amount), LEAST_LINES
        if task == "cwe":
            return lambda rng, _, amount: common_words(rng, amount, length), LEAST_WORDS
        if task == "fwe":
            return lambda rng, _, amount: frequent_words(rng, amount, length), LEAST_CODED
        if task in READING:
            reading = Reading.read(self.local, READING[task], task)
            order = stream(seed, task, 0, 0).permutation(len(reading.questions))
            return lambda rng, number, amount: reading.make(rng, int(order[number % len(order)]), amount), (
                LEAST_DOCUMENTS
            )
        raise InputError(f"RULER has no task {task!r}; known: {', '.join(self.tasks)}")
