"""RULER's question answering: a question on one of many documents, from a local copy of SQuAD 2 or HotpotQA."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grace_opt.errors import InputError
from grace_opt.evaluate.tasks.base import Question
from grace_opt.models.texts import read_text
from grace_opt.reading import parsed

NEW_TOKENS = 32
LEAST_DOCUMENTS = 2  # one that does not hold the answer; a question with more of its own has them all
ASKED = "Answer the question from these documents. Give the answer alone, in no other words."


@dataclass(frozen=True)
class Asked:
    """A question: its answers, the documents that it needs, and others on the same matter."""

    text: str
    answers: tuple[str, ...]
    own: tuple[str, ...]
    near: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """All questions and documents of a file."""

    questions: list[Asked]
    documents: list[str]

    @staticmethod
    def found(local: str | None, file: str) -> Path | None:
        """Where a local copy has the file."""
        if local is None:
            return None
        path = Path(local) / file if os.path.isdir(local) else Path(local)
        return path if path.name == file and os.path.isfile(path) else None

    @classmethod
    def read(cls, local: str | None, file: str, task: str) -> Reading:
        """Raises InputError if there is no such file or it is not in the format of its publisher."""
        path = cls.found(local, file)
        if path is None:
            raise InputError(
                f"ruler/{task} needs {file}, which is not packaged; give it or its folder as a local copy (--text)"
            )
        try:
            value = parsed(read_text(str(path)))
        except InputError as error:
            raise InputError(f"{path} is not JSON ({error}); fetch it again") from None
        try:
            questions = list(_squad(value) if file == "squad.json" else _hotpot(value))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{path} is not in the format of {file.partition('.')[0]} ({error!r}); give the published dev file"
            ) from None
        if not questions:
            raise InputError(f"{path} has no question that can be answered; give the published dev file")
        return cls(questions, sorted({document for each in questions for document in (*each.own, *each.near)}))

    def make(self, rng: np.random.Generator, at: int, amount: int) -> tuple[str, Question]:
        """The question with ``amount`` documents: its own, then those on the same matter, then any, shuffled."""
        asked = self.questions[at]
        known = {*asked.own, *asked.near}
        near = [asked.near[each] for each in rng.permutation(len(asked.near))]
        others = [each for each in self.documents if each not in known]
        others = [others[each] for each in rng.permutation(len(others))]
        pool = [*asked.own, *near, *others]
        chosen = (pool * (amount // len(pool) + 1))[: max(amount, len(asked.own))]
        shuffled = [chosen[each] for each in rng.permutation(len(chosen))]
        listed = "\n\n".join(f"Document {number}:\n{each}" for number, each in enumerate(shuffled, start=1))
        context = f"{ASKED}\n\nThe documents:\n\n{listed}"
        question = Question(f"\n\n{ASKED}\n\nQuestion: {asked.text}", asked.answers, NEW_TOKENS, " Answer:")
        return context, question


def _squad(value: Any) -> Any:
    for article in value["data"]:
        contexts = tuple(dict.fromkeys(_text(each["context"]) for each in article["paragraphs"]))
        for paragraph in article["paragraphs"]:
            near = tuple(each for each in contexts if each != paragraph["context"])
            for each in paragraph["qas"]:
                if not each.get("is_impossible", False):
                    answers = tuple(dict.fromkeys(_text(answer["text"]) for answer in each["answers"]))
                    yield Asked(_text(each["question"]), _some(answers), (paragraph["context"],), near)


def _hotpot(value: Any) -> Any:
    for each in value:
        own = tuple(f"{_text(title)}\n{''.join(sentences)}" for title, sentences in each["context"])
        yield Asked(_text(each["question"]), _some((_text(each["answer"]),)), own)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text is {type(value).__name__}")
    return value


def _some(answers: tuple[str, ...]) -> tuple[str, ...]:
    if not all(answers) or not answers:
        raise ValueError("a question has no answer")
    return answers
