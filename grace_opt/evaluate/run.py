"""Methods x budgets on texts and tasks: what `grace-opt evaluate` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grace_opt.errors import InputError
from grace_opt.evaluate import answers, kl
from grace_opt.evaluate.documents import Document, check_counts, load_dataset_documents, read_documents
from grace_opt.evaluate.measurements import Measurements
from grace_opt.evaluate.tasks import find
from grace_opt.evaluate.tasks.base import Family, uses_chat
from grace_opt.evaluate.trial import Trial
from grace_opt.models.config import context_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Record = dict[str, Any]
LENGTH = 2048


@dataclass(frozen=True)
class Plan:
    """What is asked of every trial.

    Attributes:
        tasks: ``kl``, names of families or of their tasks.
        lengths: tokens of each prompt; none: 2048, or what the model's context leaves.
        prompts: of each task and length; documents at the most of ``kl``.
        scored: tokens after each document's prompt.
        chat: ask tasks in the tokenizer's chat template; None: if it has one.
        text, dataset: where documents come from; ``text`` also the local copy of a task's data.
        seed: of prompts and intervals.
    """

    tasks: tuple[str, ...] = ("kl",)
    lengths: tuple[int, ...] = ()
    prompts: int = 12
    scored: int = 256
    chat: bool | None = None
    text: str | None = None
    dataset: str | None = None
    seed: int = 0

    @property
    def families(self) -> list[tuple[Family, str]]:
        """Every task but ``kl``, with its family. Raises InputError for an unknown name."""
        found = [each for name in self.tasks if name != "kl" for each in find(name, self.text)]
        return list({task: (family, task) for family, task in found}.values())

    def check(self) -> None:
        """Raise InputError for what no model could do."""
        for length in self.lengths:
            check_counts(length, self.scored, self.prompts)
        check_counts(None, self.scored, self.prompts)
        if "kl" not in self.tasks and self.dataset is not None:
            raise InputError("--dataset is the text of kl; give --task kl too, or leave it out")
        if not self.families and self.chat is not None:
            raise InputError("kl asks no questions, so there is no chat; leave --chat out")

    def documents(self) -> list[Document]:
        """The texts of ``kl``."""
        if self.dataset is None:
            return read_documents(self.text)
        name, _, split = self.dataset.partition(":")
        return load_dataset_documents(name, split, None if self.text is None else Path(self.text))


def run(
    model: PreTrainedModel,
    tokenizer: Any,
    trials: Sequence[Trial],
    plan: Plan,
    measurements: Measurements | None = None,
    show: Callable[..., None] = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
    keep: Callable[[Sequence[answers.Asked], Sequence[Record]], None] = lambda *_: None,
) -> list[Record]:
    """The records of ``kl`` (`EvaluationRecord`) and of tasks (`TaskRecord`), shorter prompts first.

    ``show(words, done, total)`` is progress, ``say`` a remark; ``keep`` is given all questions of tasks, and
    the answers. Raises InputError for a plan that the model or a method cannot do.
    """
    known = measurements or Measurements()
    context = context_of(model.config)
    lengths = sorted(plan.lengths) or [min(LENGTH, (context or LENGTH + plan.scored) - plan.scored)]
    found = []
    if "kl" in plan.tasks:
        texts = plan.documents()
        for length in lengths:
            chosen = kl.prompts(model, tokenizer, texts, length, plan.scored, plan.prompts)
            if chosen.too_short:
                say(f"{chosen.too_short} documents have fewer than {length + plan.scored} tokens and were left out")
            if len(chosen.ids) == 1:
                say("one document gives no interval; give more")
            words = f"kl at {length} tokens, caches scored"
            show(words)
            found += kl.evaluate(
                model,
                chosen,
                trials,
                seed=plan.seed,
                measurements=known,
                progress=lambda done, total, words=words: show(words, done, total),  # type: ignore[misc]
            )
    if plan.families:
        found += _answered(model, tokenizer, trials, plan, lengths, known, show, keep)
    return found


def _answered(
    model: PreTrainedModel,
    tokenizer: Any,
    trials: Sequence[Trial],
    plan: Plan,
    lengths: Sequence[int],
    known: Measurements,
    show: Callable[..., None],
    keep: Callable[[Sequence[answers.Asked], Sequence[Record]], None],
) -> list[Record]:
    answers.require_context(model, lengths)
    chat = uses_chat(tokenizer, plan.chat)
    words = "tasks, answers"
    show(words)
    questions = [
        each
        for length in lengths
        for family, task in plan.families
        for each in answers.asked(
            family,
            family.prompts(task, tokenizer, length, plan.prompts, seed=plan.seed, chat=chat),
            tokenizer,
            chat,
        )
    ]
    done, total = 0, len(questions) * (1 + len(trials))

    def step() -> None:
        nonlocal done
        done += 1
        show(words, done, total)

    measured = answers.measure(model, tokenizer, questions, trials, measurements=known, progress=step)
    keep(questions, measured)
    return answers.records(measured, trials, seed=plan.seed)
