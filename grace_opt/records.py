"""What is recorded, declared once: `-f json`, records.jsonl, SQL columns, the API and the docs' tables are views of it.

A record travels as a JSON object (a dict); the dataclasses here name its fields, and are not instantiated. Pydantic
reads them as they are, metadata included, so `check` and the API's schema need no second declaration. A number
that is not finite is null.
"""

# ruff: noqa: RUF009  (`_about` makes a field)

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, ClassVar

from grace_opt.errors import InputError
from grace_opt.solution import BoundKind, Limit, Status

SHA256 = "^[0-9a-f]{64}$"
BUDGET = ("ratio", "value_ratio", "budget_bytes")


def _about(description: str, unit: str = "", **more: Any) -> Any:
    """A field: what it means, in which unit, and arguments of pydantic's ``Field`` (``default`` is the dataclass's)."""
    default = {"default": more.pop("default")} if "default" in more else {}
    return field(**default, metadata={"description": description, "unit": unit, **more})


class _Strict:
    #: read by pydantic: NaN and infinity are refused, more fields are left alone
    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"allow_inf_nan": False}


@dataclass(frozen=True, kw_only=True)
class TimingNs(_Strict):
    """Wall-clock time; the parts are as the solver reports them, 0 if it does not."""

    build: int = _about("making the solver's model", "nanoseconds")
    solve: int = _about("searching", "nanoseconds")
    round: int = _about("making a selection of what was found", "nanoseconds")
    total: int = _about(
        "measured by the front end; in a batch, the batch's time divided by its problems", "nanoseconds"
    )


@dataclass(frozen=True, kw_only=True)
class LimitsUsed(_Strict):
    """The limits of the run; null for none."""

    time_limit: float | None = _about("for each head", "seconds")
    gap_rel: float = _about("relative gap at which a head counts as optimal", "fraction")
    gap_abs: float = _about("absolute gap at which a head counts as optimal", "objective")
    node_limit: int | None = _about("for each head", "nodes")
    iteration_limit: int | None = _about("for each head", "iterations")


@dataclass(frozen=True, kw_only=True)
class SolutionRecord(_Strict):
    """What one solver said of one head: `Solution.record`."""

    problem: str = _about(
        "the head: prefix of its tensors, e.g. `layers.3.kv_heads.1.key`", examples=["layers.3.kv_heads.1.key"]
    )
    pruned: list[int] | None = _about("sorted indices of what is pruned; null without a selection", "channels")
    digest: str = _about("sha256 of weights, count, protected channels and groups", "hex", pattern=SHA256)
    n: int = _about("in all", "channels")
    prune: int = _about("to prune", "channels")
    solver: str = _about("its name")
    solver_version: str = _about("version of the package that the solver comes from")
    status: Status = _about("what the selection is")
    limit: Limit = _about("what ended the run")
    raw_status: str = _about("the solver's own word, for diagnosis")
    objective: float | None = _about("recomputed; null without a selection", "squared logit error")
    lower_bound: float | None = _about("null if there is none", "squared logit error")
    bound_kind: BoundKind = _about("how far the bound can be trusted")
    gap: float | None = _about("(objective - lower bound) / |objective|; null if there is no bound", "fraction")
    nodes: int = _about("as the solver counts them")
    iterations: int = _about("as the solver counts them")
    timing_ns: TimingNs = _about("wall-clock time")
    seed: int = _about("as asked for")
    threads: int = _about("as asked for")
    options: dict[str, Any] = _about("the solver's options, defaults included")
    warnings: list[str] = _about("what the solver or the front end remarked", "sentences")
    versions: dict[str, str] = _about("of Python, grace-opt, numpy, and of what the solver requires")
    trace: list[tuple[float | None, float | None, float | None]] = _about(
        "time since the start, objective and lower bound whenever one of the two improved", "seconds, objective twice"
    )


@dataclass(frozen=True, kw_only=True)
class InstanceRecord(SolutionRecord):
    """A line of records.jsonl of a comparison: whose head it was, at what budget and under which limits."""

    bundle: str = _about("of the head: its path, or in the service its sha256")
    ratio: float | None = _about("key channels to prune, as asked for; null with a budget in bytes", "fraction")
    value_ratio: float | None = _about(
        "value channels to prune, as asked for; null: as the keys', or a budget in bytes", "fraction", default=None
    )
    budget_bytes: float | None = _about(
        "of an old token, as asked for in place of the ratios; null with ratios", "bytes", default=None
    )
    limits: LimitsUsed = _about("of the run; null for none")


@dataclass(frozen=True, kw_only=True)
class Record(InstanceRecord):
    """With what all records of the same problem (the same `digest`) say together; once a run is complete."""

    best_known: float | None = _about("smallest objective of any solver", "objective", default=None)
    over_best: float | None = _about(
        "(objective - best known) / |best known|; 0 if both are 0", "fraction", default=None
    )
    best_bound: float | None = _about("largest lower bound of kind `proven` of any solver", "objective", default=None)
    best_bound_solver: str | None = _about("whose `best_bound` is", default=None)
    reference_gap: float | None = _about("gap of this objective to `best_bound`", "fraction", default=None)


@dataclass(frozen=True, kw_only=True)
class Interval(_Strict):
    """A mean and its 95 % interval, which is null where there is too little to tell."""

    mean: float = _about("")
    low: float | None = _about("")
    high: float | None = _about("")


@dataclass(frozen=True, kw_only=True)
class Measurement(_Strict):
    """A line of measurements.jsonl of an evaluation: one trial on one prompt. The other fields are its task's."""

    key: str = _about("sha256 of model, prompt and trial; by it a killed run goes on", "hex", pattern=SHA256)
    task: str = _about("whose prompt it is")


@dataclass(frozen=True, kw_only=True)
class EvaluatedRecord(_Strict):
    """What the records of an evaluation have in common: one method, or mask, at one budget."""

    model: str = _about("as given", default="")
    task: str = _about("`kl`, or the name of a task")
    length: int = _about("of each prompt; for `kl`, what is read before anything is compressed", "tokens")
    method: str = _about("its name; of a mask, its path")
    options: dict[str, Any] = _about("every field of the method")
    ratio: float | None = _about("key channels pruned, as asked for; of a mask, as measured", "fraction")
    value_ratio: float | None = _about("value channels pruned, as asked for; of a mask, as measured", "fraction")
    budget_bytes: float | None = _about("of an old token, as asked for in place of the ratios", "bytes")
    budget_share: float | None = _about("of the bytes held, as asked for in place of the others", "fraction")
    generated: str = _about(
        "tokens after the prompt stay whole, or are pruned as they leave the recent window", "keep, prune"
    )
    bytes_per_token: float = _about(
        "all bytes of the cache divided by the prompt's tokens, counted from tensors: also read-outs and channel "
        "numbers",
        "bytes",
    )
    full_bytes_per_token: float = _about("the same of the uncompressed cache", "bytes")
    against_first: float | None = _about("p-value against the first method at the same budget")


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord(EvaluatedRecord):
    """What `evaluate` measured of a method, or of a mask, at one budget: its divergence on a text."""

    kl: Interval = _about(
        "divergence of the compressed predictions from the uncompressed ones: `mean`, `low`, `high`", "nats a token"
    )
    nll: Interval = _about("by how much the text's own tokens cost more, the same three", "nats a token")
    top1: float = _about("tokens whose likeliest successor stays the same", "fraction")
    documents: int = _about("documents scored")
    too_short: int = _about("documents left out")
    scored: int = _about("scored in each document", "tokens")
    kl_documents: list[float] = _about("each document's KL", "nats a token")
    kl_positions: list[dict[str, float | None]] = _about(
        "KL in spans `from`, `to` of positions after the prompt", "nats a token"
    )
    kept: dict[str, list[list[float]] | None] = _about(
        "mean kept channels of each layer and KV head, for `key` and `value`; null if all are whole", "channels"
    )
    layers: list[int] = _about("which layers the model caches")
    head_dim: int = _about("of a whole key", "channels")
    value_head_dim: int = _about("of a whole value", "channels")


@dataclass(frozen=True, kw_only=True)
class TaskRecord(EvaluatedRecord):
    """What `evaluate` measured of a method, or of a mask, at one budget: its answers to a task's questions.

    ``task`` is a family's name in the mean over those of its tasks that the uncompressed cache solves.
    """

    protocol: str = _about("whether the question is compressed with the context", "query-aware, context-only")
    tasks: list[str] = _about("whose mean it is")
    prompts: int = _about("asked of each task")
    score: Interval = _about("as the task scores answers, 1 the best: `mean`, `low`, `high`", "fraction")
    full_score: float = _about("the same of the uncompressed cache", "fraction")
    solved: bool = _about("whether `full_score` is at least 0.6: a task that the model cannot do tells nothing")
    against_full: float | None = _about("p-value against the uncompressed cache; null for itself")
    places: list[dict[str, Any]] = _about("`score` and `asked` by place, such as a needle's `depth`")


def names(model: type) -> tuple[str, ...]:
    """The names of a record's fields."""
    return tuple(each.name for each in fields(model))


def added(model: type) -> tuple[str, ...]:
    """The names of the fields that a record has and its base has not."""
    (base,) = model.__bases__
    inherited = names(base) if is_dataclass(base) else ()
    return tuple(name for name in names(model) if name not in inherited)


def check(model: type, record: Mapping[str, Any] | str | bytes) -> None:
    """See that a record, or the text of one, has the model's fields; it may have more.

    Raises:
        InputError: saying which field is wrong, and how.
    """
    from pydantic import ValidationError

    validator = _validator(model)
    try:
        if isinstance(record, str | bytes):
            validator.validate_json(record)
        else:
            validator.validate_python(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise InputError(f"{where}{first['msg']}") from None


def now() -> str:
    """The time as it is recorded: UTC in ISO 8601, to the second. To be shown, never compared: clocks jump."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def budget_of(record: Mapping[str, Any]) -> dict[str, float | None]:
    """The fields of a record that say how much was to be pruned; null those that an old record lacks."""
    return {name: record.get(name) for name in BUDGET}


def budget_name(record: Mapping[str, Any]) -> str:
    """A record's budget in a word: `0.5`, `0.5,0.3` (keys, values) or `200B` (bytes); fit for keys and addresses."""
    ratio, values, size = budget_of(record).values()
    if size is not None:
        return f"{_number(size)}B"
    return _number(ratio) + ("" if values is None else f",{_number(values)}")


def budget_words(record: Mapping[str, Any]) -> str:
    """A record's budget as people say it: `ratio 0.5`, `ratios 0.5 and 0.3` or `200 bytes a token`."""
    ratio, values, size = budget_of(record).values()
    if size is not None:
        return f"{_number(size)} bytes a token"
    return f"ratio {_number(ratio)}" if values is None else f"ratios {_number(ratio)} and {_number(values)}"


@cache
def _validator(model: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(model)


def _number(value: Any) -> str:
    return repr(float(value)).removesuffix(".0")
