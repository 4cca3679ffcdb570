"""LongBench and LongBench-E: real documents with questions, from a local copy or from the hub.

A local copy is a folder with qasper.jsonl and so on (with qasper_e.jsonl for LongBench-E), or one such file, in the
published format: a row a line with ``context``, ``input``, ``answers``, for classification ``all_classes``, and for
LongBench-E ``length``. Rows in the format of the hub's copy, with ``question`` and ``answer_prefix`` in place of
``input``, do as well. What differs from the published protocol is `LongBench.differs`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from grace_opt.errors import InputError
from grace_opt.evaluate.documents import dataset_rows, local_file, text_field
from grace_opt.evaluate.tasks.base import Family, Prompt, Question, rendered
from grace_opt.evaluate.tasks.filling import size, stream
from grace_opt.evaluate.tasks.longbench import metrics
from grace_opt.evaluate.tasks.longbench.wording import EVEN, WORDING, Wording

RANGES = (8000, 4000, 0)  #: words of a row of LongBench-E, from which its score is reported apart


class LongBench(Family):
    """Documents that are longer than a length lose their middle; shorter ones stay as they are."""

    name = "longbench"
    tasks = tuple(f"longbench/{task}" for task in WORDING)
    differs = (
        "Answers, metrics, tokens to generate and the order of the parts are the published ones; the wording of "
        "prompts is our own, but for copies that have questions and answer prefixes. The length counts the generated "
        "tokens too; the middle of a long prompt is cut out, as published, but never from its question. "
        "Rows are a random sample. The chat template is the tokenizer's own, or none. Code is compared by difflib, as "
        "fuzzywuzzy does without python-Levenshtein."
    )
    suffix: ClassVar[str] = ""

    @property
    def at_hand(self) -> tuple[str, ...]:
        if self.local is None:
            return self.tasks
        found = tuple(task for task in self.tasks if self._has(self._split(task)))
        if not found:
            raise InputError(
                f"{self.local} holds nothing of {self.name}; give a folder with files such as qasper{self.suffix}.jsonl"
            )
        return found

    def prompts(
        self, task: str, tokenizer: Any, length: int, count: int, *, seed: int = 0, chat: bool = False
    ) -> list[Prompt]:
        """At most ``count``: as many as there are rows. Raises InputError also for rows that lack fields."""
        wording = WORDING[self._short(task)]
        metrics.require(wording.metric)
        split = self._split(task)
        local = None if self.local is None else Path(self.local)
        rows = list(dataset_rows("longbench", split, local))
        order = stream(seed, task, 0, 0).permutation(len(rows))[:count]
        made = []
        for number, at in enumerate(order):
            row = _row(wording, rows[at][1], f"row {rows[at][0]} of {split}", bool(self.suffix))
            prompt = Prompt(task, number, length, row.context, (row.question,), row.place, wording.plain)
            made.append(_cut(prompt, tokenizer, chat))
        return made

    def score(self, task: str, question: Question, text: str) -> float:
        """By the task's metric, against the answer that fits best."""
        wording = WORDING[self._short(task)]
        if wording.one_line:
            text = text.lstrip("\n").partition("\n")[0]
        return max(float(wording.metric(text, answer, question.choices)) for answer in question.answers)

    def _short(self, task: str) -> str:
        return task.removeprefix(f"{self.name}/")

    def _split(self, task: str) -> str:
        return self._short(task) + self.suffix

    def _has(self, split: str) -> bool:
        path = Path(self.local or "")
        if not os.path.isdir(path):
            return path.stem == split
        try:
            return local_file(path, split).is_file()
        except InputError:
            return False


class LongBenchE(LongBench):
    """LongBench-E. A prompt's ``words_from`` is the range of its row's length: 0, 4000 or 8000 words."""

    name = "longbench-e"
    tasks = tuple(f"longbench-e/{task}" for task in EVEN)
    suffix = "_e"


@dataclass(frozen=True)
class _Row:
    context: str
    question: Question
    place: Mapping[str, float]


def _row(wording: Wording, row: Mapping[str, Any], where: str, even: bool) -> _Row:
    """A row in the published format or in that of the hub's copy, checked."""
    context = text_field(row, "context", where)
    answers = _strings(row, "answers", where)
    choices = _strings(row, "all_classes", where) if wording.metric is metrics.classification else ()
    if wording.metric is metrics.retrieval:
        for answer in answers:
            metrics.paragraph(answer)
    if "answer_prefix" in row:
        asked, prefix = text_field(row, "question", where), text_field(row, "answer_prefix", where)
    else:
        context = wording.before + context
        asked, prefix = wording.asked(text_field(row, "input", where)), wording.prefix
    place = {"words_from": _range(row, where)} if even else {}
    return _Row(context, Question(asked, answers, wording.new_tokens, prefix, choices), place)


def _range(row: Mapping[str, Any], where: str) -> float:
    words = row.get("length")
    if not isinstance(words, int) or words < 0:
        raise InputError(f'{where} has no whole number "length"; every line of LongBench-E needs one')
    return float(next(each for each in RANGES if words >= each))


def _strings(row: Mapping[str, Any], field: str, where: str) -> tuple[str, ...]:
    value = row.get(field)
    if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
        raise InputError(f'{where} has no list of strings "{field}"; every line needs one')
    return tuple(text_field({field: each}, field, where) for each in value)


def _cut(prompt: Prompt, tokenizer: Any, chat: bool) -> Prompt:
    """The prompt in its length, without the middle if it is longer: half of what is kept is from each end of the whole.

    The context is cut into tokens and put together again, so a cut may take some tokens more than it must.
    """
    over = size(prompt, tokenizer, chat) - prompt.length
    if over <= 0:
        return prompt
    question = prompt.questions[0]
    ids = tokenizer(prompt.context, add_special_tokens=False, verbose=False)["input_ids"]
    around = rendered(replace(prompt, context=""), question, "context-only", tokenizer, chat)
    room = prompt.length - question.new_tokens
    least = len(around.compressed) + len(around.following) + question.new_tokens + 2
    while True:
        front = room // 2 - len(around.compressed)
        back = room - room // 2 - len(around.following)
        front, back = front + min(back, 0), back + min(front, 0)
        if front < 1 or back < 0:
            raise InputError(f"{prompt.task} needs prompts of at least {least} tokens, got a length of {prompt.length}")
        kept = [tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:front], ids[len(ids) - back :])]
        cut = replace(prompt, context="".join(kept))
        over = size(cut, tokenizer, chat) - prompt.length
        if over <= 0:
            return cut
        room -= over
