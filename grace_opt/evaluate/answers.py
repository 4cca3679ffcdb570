"""Tasks' questions, answered from compressed caches: one prefill a prompt for all trials."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from grace_opt.errors import InputError
from grace_opt.evaluate.capture import Captured, capture, dense, extended
from grace_opt.evaluate.measurements import Measurements, key_of
from grace_opt.evaluate.replay import Decoding, decode
from grace_opt.evaluate.statistics import Interval, bootstrap_mean, paired, rate
from grace_opt.evaluate.tasks.base import PROTOCOLS, Family, Prompt, Question, Rendered, rendered
from grace_opt.evaluate.trial import Trial
from grace_opt.models.config import config_sha256, context_of
from grace_opt.runtime.cache import cache_nbytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from grace_opt.compression.plan import CachePlan

Record = dict[str, Any]
TOGETHER = 32  #: caches that decode side by side at the most
SOLVED = 0.6  #: score of the uncompressed cache from which on a task tells methods apart


@dataclass(frozen=True)
class Asked:
    """A question of a prompt, under a protocol, as token ids."""

    family: Family
    prompt: Prompt
    number: int  #: of the question
    ids: Rendered

    @property
    def question(self) -> Question:
        return self.prompt.questions[self.number]


def asked(family: Family, prompts: Sequence[Prompt], tokenizer: Any, chat: bool) -> list[Asked]:
    """Every question of every prompt under every protocol, those of one compressed context side by side."""
    return [
        Asked(family, prompt, number, rendered(prompt, question, protocol, tokenizer, chat))
        for prompt in prompts
        for protocol in PROTOCOLS
        for number, question in enumerate(prompt.questions)
    ]


def require_context(model: PreTrainedModel, lengths: Sequence[int]) -> None:
    """Raise InputError for prompts longer than the model's context; generated tokens are within their length."""
    context = context_of(model.config)
    if context is not None and max(lengths, default=0) > context:
        raise InputError(f"{max(lengths)} tokens are more than the model's context of {context}; make them shorter")


def measure(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: Sequence[Asked],
    trials: Sequence[Trial],
    *,
    measurements: Measurements | None = None,
    progress: Callable[[], None] = lambda: None,
) -> list[Record]:
    """The answers to every question: by the uncompressed cache (method ``full``), and by every trial's.

    A prompt's context is run once, uncompressed, as prefill does, and of each question what its protocol compresses
    with it. Each trial's real cache is built from that, what follows is read on it, and the answer decoded greedily:
    until the model ends it, the question's ``new_tokens`` are there, or more of them cannot change its score. Several
    caches decode side by side. What ``measurements`` knows is not run; ``progress`` is called
    after each answer. Raises InputError for a budget or a prompt that a method cannot do.
    """
    known = measurements or Measurements()
    asking = _Asking(model, tokenizer, questions, trials)
    rows = [(each, trial, asking.key(each, trial)) for each in questions for trial in (None, *trials)]
    size = _side_by_side(model, questions)
    found: list[Record] = []
    # In parts that depend on what is asked alone, so that a run that goes on decodes what it would have decoded.
    for low in range(0, len(rows), size):
        part = rows[low : low + size]
        asking.answer({key: (each, trial) for each, trial, key in part if not known.has([key])}, known)
        for each, _, key in part:
            found.append({**known.of(key), "protocol": each.ids.protocol})
            progress()
    return found


def _side_by_side(model: PreTrainedModel, questions: Sequence[Asked]) -> int:
    """How many caches decode together: as many as take no more than twice the bytes of the model's weights."""
    weights = sum(each.nbytes for each in model.parameters())
    longest = max((each.ids for each in questions), key=lambda ids: len(ids.compressed + ids.following), default=None)
    if longest is None:
        return 1
    few = longest.compressed[:8]
    a_token = cache_nbytes(capture(model, few, len(few), 1).past) / len(few)
    return max(1, min(TOGETHER, int(2 * weights / (a_token * len(longest.compressed + longest.following)))))


class _Prefills:
    """What the questions of one prompt compress, run when it is needed, and the plans for it."""

    def __init__(self, model: PreTrainedModel, context: Sequence[int], queries: int) -> None:
        self._model, self._context, self._queries = model, list(context), queries
        self._last: Captured | None = None
        self._rest: list[int] | None = None  # what the last one has after the context
        self._plans: dict[int, CachePlan] = {}  # for the last one, by the id of the trial

    @cached_property
    def _read(self) -> Captured:
        return capture(self._model, self._context, len(self._context), self._queries)

    def of(self, question: Asked) -> Captured:
        """What a question compresses; kept until the next one compresses something else."""
        rest = question.ids.compressed[len(self._context) :]
        if self._last is None or rest != self._rest:
            self._last = extended(self._read, rest) if rest else self._read
            self._rest, self._plans = rest, {}
        return self._last

    def plan(self, question: Asked, trial: Trial) -> CachePlan:
        """What a trial makes of it, made once for all questions on one context."""
        captured = self.of(question)
        if id(trial) not in self._plans:
            self._plans[id(trial)] = trial.plan(captured)
        return self._plans[id(trial)]


class _Asking:
    """A model's answers, scored."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, questions: Sequence[Asked], trials: Sequence[Trial]
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._ends = _ends(model)
        self._digests = {id(trial): trial.digest() for trial in trials}
        self._queries = max((trial.queries for trial in trials), default=1)
        self._contexts: dict[int, list[int]] = {}  # of each prompt, with which all of its questions begin
        for each in questions:
            known = self._contexts.setdefault(id(each.prompt), each.ids.compressed)
            self._contexts[id(each.prompt)] = min(known, each.ids.compressed, key=len)
        self._prefills: tuple[int, _Prefills] | None = None  # of the last prompt

    def _of_prompt(self, prompt: Prompt) -> _Prefills:
        if self._prefills is None or self._prefills[0] != id(prompt):
            self._prefills = id(prompt), _Prefills(self.model, self._contexts[id(prompt)], self._queries)
        return self._prefills[1]

    def key(self, asked: Asked, trial: Trial | None) -> str:
        """Of the measurement of one answer."""
        ids, question = asked.ids, asked.question
        rules = (question.answers, question.new_tokens)
        model = (str(self.model.config.name_or_path), config_sha256(self.model.config))
        if trial is None:  # the uncompressed cache does not depend on what was to be compressed
            return key_of("full", *model, asked.prompt.task, ids.compressed + ids.following, rules)
        return key_of(*model, asked.prompt.task, ids.compressed, ids.following, *rules, self._digests[id(trial)])

    def answer(self, rows: Mapping[str, tuple[Asked, Trial | None]], known: Measurements) -> None:
        """Add the measurements of these keys, decoded together."""
        with ExitStack() as open_caches, torch.inference_mode():
            decodings, records = [], []
            for asked, trial in rows.values():
                prefills = self._of_prompt(asked.prompt)
                captured = prefills.of(asked)
                if trial is None:
                    past, held = dense(captured), cache_nbytes(captured.past)
                else:
                    past = open_caches.enter_context(trial.cache(captured, prefills.plan(asked, trial)))
                    held = cache_nbytes(past)
                following = torch.tensor([asked.ids.following], device=captured.ids.device)
                decodings.append(Decoding(past, following, asked.question.new_tokens, partial(self._over, asked)))
                records.append({"tokens": captured.prefix, "bytes": held, "full_bytes": cache_nbytes(captured.past)})
            decode(self.model, decodings)
        for (key, row), decoding, record in zip(rows.items(), decodings, records, strict=True):
            known.add(key, self._record(*row, self._text(decoding.tokens)) | record)

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _over(self, asked: Asked, tokens: list[int]) -> bool:
        """Whether an answer is ended, or can get no better."""
        if tokens[-1] in self._ends:
            return True
        return asked.family.grows and asked.family.score(asked.prompt.task, asked.question, self._text(tokens)) == 1

    def _record(self, asked: Asked, trial: Trial | None, text: str) -> Record:
        return {
            "task": asked.prompt.task,
            "family": asked.family.name,
            "length": asked.prompt.length,
            "number": asked.prompt.number,
            "question": asked.number,
            "place": dict(asked.prompt.place),
            **(FULL if trial is None else trial.asked()),
            "answer": text,
            "answers": list(asked.question.answers),
            "score": asked.family.score(asked.prompt.task, asked.question, text),
        }


FULL: Record = {
    "method": "full",
    "options": {},
    "ratio": 0.0,
    "value_ratio": 0.0,
    "budget_bytes": None,
    "budget_share": None,
    "generated": "keep",
}


def _ends(model: PreTrainedModel) -> set[int]:
    """The tokens with which the model ends an answer."""
    found: set[int] = set()
    for config in (getattr(model, "generation_config", None), model.config):
        told = getattr(config, "eos_token_id", None)
        found |= {told} if isinstance(told, int) else set(told or ())
    return found


def records(measured: Sequence[Record], trials: Sequence[Trial], *, seed: int = 0) -> list[Record]:
    """One record for each task, length, protocol and trial, the uncompressed cache first, and for each family's mean.

    ``measured``: from `measure`, with the same trials. The fields are those of `grace_opt.records.TaskRecord`. A prompt
    is one observation: the mean of its questions' scores; a family's is the mean over the tasks that are solved.
    """
    each = 1 + len(trials)
    by_place: dict[tuple[str, str, int, str], list[list[Record]]] = {}
    for at, record in enumerate(measured):
        place = (record["family"], record["task"], record["length"], record["protocol"])
        by_place.setdefault(place, [[] for _ in range(each)])[at % each].append(record)
    budgets = [None, *(trial.budget for trial in trials)]
    found = [
        record for (_, task, *_), rows in by_place.items() for record in _task_records(task, [rows], budgets, seed)
    ]
    for family, length, protocol in dict.fromkeys((of, long, how) for of, _, long, how in by_place):
        tasks = {
            task: rows
            for (of, task, long, how), rows in by_place.items()
            if (of, long, how) == (family, length, protocol) and _mean(rows[0]) >= SOLVED
        }
        if len(tasks) > 1:
            found += _task_records(family, list(tasks.values()), budgets, seed)
    return found


def _task_records(
    name: str, tasks: Sequence[list[list[Record]]], budgets: Sequence[Any], seed: int
) -> Iterator[Record]:
    """Records of the mean over tasks; ``tasks``: of each task, each trial's measurements."""
    scores = [np.mean([list(_by_prompt(rows[at])) for rows in tasks], axis=0) for at in range(len(budgets))]
    for at, of_trial in enumerate(zip(*tasks, strict=True)):
        flat = [record for rows in of_trial for record in rows]
        first = next(i for i, budget in enumerate(budgets) if budget == budgets[at])
        yield {
            **{field: flat[0][field] for field in (*FULL, "length", "protocol")},
            "task": name,
            "tasks": [rows[0]["task"] for rows in of_trial],
            "prompts": len(scores[at]),
            "score": asdict(_interval(scores[at], seed)),
            "full_score": float(scores[0].mean()),
            "solved": bool(scores[0].mean() >= SOLVED),
            "bytes_per_token": float(np.mean([record["bytes"] / record["tokens"] for record in flat])),
            "full_bytes_per_token": float(np.mean([record["full_bytes"] / record["tokens"] for record in flat])),
            "against_full": None if at == 0 else paired(scores[at], scores[0], seed=seed).p_value,
            "against_first": None if at == first else paired(scores[at], scores[first], seed=seed).p_value,
            "places": list(_places(flat)),
        }


def _by_prompt(measured: Sequence[Record]) -> Iterator[float]:
    """The mean score of each prompt's questions; those of one prompt are side by side."""
    for _, of_prompt in groupby(measured, key=lambda record: record["number"]):
        yield _mean(list(of_prompt))


def _mean(measured: Sequence[Record]) -> float:
    return float(np.mean([record["score"] for record in measured]))


def _interval(scores: np.ndarray, seed: int) -> Interval:
    """Of answers that are right or wrong, Wilson's; of others by resampling the prompts."""
    if np.isin(scores, (0, 1)).all():
        return rate(scores == 1)
    return bootstrap_mean(scores, seed=seed)


def _places(measured: Sequence[Record]) -> Iterator[Record]:
    """Mean scores by place, where the prompts have one."""
    placed = sorted((record for record in measured if record["place"]), key=lambda record: str(record["place"]))
    for _, same in groupby(placed, key=lambda record: str(record["place"])):
        rows = list(same)
        yield {**rows[0]["place"], "score": _mean(rows), "asked": len(rows)}
