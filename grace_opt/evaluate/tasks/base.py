"""What a task family does: it makes prompts of a length, and scores answers.

A prompt is a context and one or more questions on it. Under `query-aware` the question is compressed with the context,
as every cache does that compresses when the prompt has been read; under `context-only` it comes after, as a second
question on the same context does. Which of the two decides rankings, so both are always reported.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from grace_opt.errors import InputError
from grace_opt.models.texts import bos_of

PROTOCOLS = ("query-aware", "context-only")
_MARK = "\x00question\x00"


@dataclass(frozen=True)
class Question:
    """What follows a context.

    Attributes:
        text: as it follows the context.
        answers: strings that a right answer has.
        new_tokens: how many are generated at the most.
        prefix: the beginning of the answer, which the prompt already has; white space that parts it from the question
            is left out where a chat template begins the answer.
        choices: every answer that there could be, for tasks that classify.
    """

    text: str
    answers: tuple[str, ...]
    new_tokens: int
    prefix: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """One context with its questions; with the longest of them, and what is generated, at most ``length`` tokens.

    ``place``: where in a task's space it lies, such as the ``depth`` of a needle. ``plain``: never in a chat template,
    as the task is published.
    """

    task: str
    number: int
    length: int
    context: str
    questions: tuple[Question, ...]
    place: Mapping[str, float] = field(default_factory=dict)
    plain: bool = False


class Family(ABC):
    """A family of tasks.

    Attributes:
        name: in `FAMILIES`.
        tasks: the names of its tasks.
        grows: whether more text never lowers a score, so that an answer with score 1 may end.
        differs: what differs from the published task, for reports.
    """

    name: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]
    grows: ClassVar[bool] = False
    differs: ClassVar[str] = ""

    def __init__(self, local: str | None = None) -> None:
        """``local``: a local copy of the data that some tasks have."""
        self.local = local

    @property
    def at_hand(self) -> tuple[str, ...]:
        """The tasks that the family's own name stands for: those whose data is here."""
        return self.tasks

    @abstractmethod
    def prompts(
        self, task: str, tokenizer: Any, length: int, count: int, *, seed: int = 0, chat: bool = False
    ) -> list[Prompt]:
        """``count`` prompts of a task, the same for the same seed, in every process.

        Raises InputError for a length that is too short for the task, with the least.
        """

    @abstractmethod
    def score(self, task: str, question: Question, text: str) -> float:
        """From 0 to 1, for a generated text (without the question's prefix)."""


@dataclass(frozen=True)
class Rendered:
    """A question as token ids: what is compressed, and what is read on the compressed cache before the answer."""

    protocol: str
    compressed: list[int]
    following: list[int]


def rendered(prompt: Prompt, question: Question, protocol: str, tokenizer: Any, chat: bool = False) -> Rendered:
    """The ids are those of one text, the same under both protocols, with one BOS; only the cut between them differs.

    Under `query-aware` all but the last token is compressed. ``chat``: in the tokenizer's template, as one turn of a
    user, which the answer's prefix follows.
    """
    chat = chat and not prompt.plain
    head, tail = _around(prompt.context, question, tokenizer, chat)
    bos = [] if chat else bos_of(tokenizer)
    context, rest = bos + _ids(tokenizer, head), _ids(tokenizer, tail)
    if protocol == "context-only":
        return Rendered(protocol, context, rest)
    return Rendered(protocol, (context + rest)[:-1], (context + rest)[-1:])


def uses_chat(tokenizer: Any, asked: bool | None) -> bool:
    """Whether prompts go through the tokenizer's chat template: as asked for, or if it has one.

    Raises InputError if it is asked for and there is none.
    """
    has = getattr(tokenizer, "chat_template", None) is not None
    if asked and not has:
        raise InputError(
            "the tokenizer has no chat template; leave out --chat, or give a model that was tuned for chat"
        )
    return has if asked is None else asked


def _around(context: str, question: Question, tokenizer: Any, chat: bool) -> tuple[str, str]:
    """The whole text, up to the end of the context and from there."""
    if not chat:
        return context, question.text + question.prefix
    turn = [{"role": "user", "content": context + _MARK + question.text}]
    text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    head, mark, tail = text.partition(_MARK)
    if not mark:
        raise InputError("the tokenizer's chat template changes what a user says; leave it out (--no-chat)")
    return head, tail + question.prefix.lstrip()


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
