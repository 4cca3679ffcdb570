"""What any solver run says: the words shared by solvers, the front end, records, the API and the docs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from grace_opt.problem import BoolArray, FloatArray, SubsetProblem

#: A proven bound may lie above the optimum by rounding only: by this part of the sum of |W_ij| over the prunable
#: channels (`rounding_slack`), and where two objectives or bounds are compared, by `OBJECTIVE_SLACK` of the objective.
ROUNDING_SLACK = 1e-12
OBJECTIVE_SLACK = 1e-9


class Status(StrEnum):
    """What the returned selection is."""

    OPTIMAL = "optimal"  #: proven within the gap tolerance
    FEASIBLE = "feasible"  #: a valid selection, not proven optimal
    INFEASIBLE = "infeasible"  #: no selection exists
    NO_SOLUTION = "no_solution"  #: the run ended without a selection
    NUMERICAL_ERROR = "numerical_error"  #: the run's own numbers contradict each other
    ERROR = "error"  #: the solver failed


class Limit(StrEnum):
    """Which limit ended the run; reaching a limit is not an error."""

    TIME = "time"
    NODE = "node"
    ITERATION = "iteration"
    INTERRUPTED = "interrupted"
    NONE = "none"


class BoundKind(StrEnum):
    """How far a lower bound can be trusted."""

    PROVEN = "proven"  #: valid in floating point, up to `rounding_slack`
    NUMERICAL = "numerical"  #: as a solver reported it
    NONE = "none"  #: no bound


@dataclass(frozen=True)
class Limits:
    """Limits and tolerances of one run; ``None`` leaves a limit out.

    Attributes:
        time_limit: seconds of wall-clock time.
        gap_rel, gap_abs: a selection counts as optimal when either tolerance holds.
        seed: of all randomness; the same seed gives the same selection.
        threads: at most this many.
    """

    time_limit: float | None = None
    gap_rel: float = 1e-6
    gap_abs: float = 0.0
    node_limit: int | None = None
    iteration_limit: int | None = None
    seed: int = 0
    threads: int = 1


@dataclass(frozen=True)
class Timing:
    """Wall-clock nanoseconds."""

    build: int = 0
    solve: int = 0
    round: int = 0
    total: int = 0


@dataclass(frozen=True)
class Capabilities:
    """What a solver can do, known before it runs.

    ``time_limit``, ``node_limit`` and ``iteration_limit``: the limits that it honours; each solution warns of one that
    is set and that it does not. ``largest_n`` is the size it is meant for (None: any); ``requires`` names
    distributions whose versions are stamped on each solution.
    """

    exact: bool = False
    bounds: bool = False
    time_limit: bool = False
    node_limit: bool = False
    iteration_limit: bool = False
    warm_start: bool = False
    groups: bool = False
    batched: bool = False
    largest_n: int | None = None
    requires: tuple[str, ...] = ()


#: (seconds since the start, objective of the incumbent, lower bound) whenever one of the two improved; infinite
#: where there is none yet.
Trace = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class RawResult:
    """What a solver returns. The front end trusts only ``pruned``, and that after checking it."""

    pruned: BoolArray | None
    lower_bound: float = -math.inf
    bound_kind: BoundKind = BoundKind.NONE
    status: Status = Status.FEASIBLE  #: looked at only when ``pruned`` is None
    limit: Limit = Limit.NONE
    raw_status: str = ""
    nodes: int = 0
    iterations: int = 0
    timing: Timing = Timing()
    warnings: tuple[str, ...] = ()
    trace: Trace = ()


@runtime_checkable
class Solver(Protocol):
    """A solver: a small frozen dataclass whose fields are its options."""

    @property
    def name(self) -> str: ...

    @property
    def capabilities(self) -> Capabilities: ...

    def supports(self, problem: SubsetProblem) -> bool | str:
        """True, or a sentence that says why not."""
        ...

    def solve(
        self,
        problem: SubsetProblem,
        limits: Limits,
        warm_start: BoolArray | None = None,
        rng: np.random.Generator | None = None,
    ) -> RawResult: ...


@runtime_checkable
class BatchSolver(Solver, Protocol):
    """A solver that is faster on many problems at once (``capabilities.batched``)."""

    def solve_batch(self, problems: Sequence[SubsetProblem], limits: Limits) -> list[RawResult]: ...


def ignored_limits(solver: Solver, limits: Limits) -> tuple[str, ...]:
    """A sentence for each limit that is set and that the solver does not say it honours (`Capabilities`)."""
    able = solver.capabilities
    return tuple(
        f"{solver.name} honours no {name.replace('_', ' ')}, so {name} = {getattr(limits, name):g} has no effect on it"
        for name in ("time_limit", "node_limit", "iteration_limit")
        if getattr(limits, name) is not None and not getattr(able, name)
    )


def rounding_slack(weights: FloatArray) -> float:
    """By how much rounding may raise a proven bound over these weights, float64[k, k]: 1e-12 of the sum of |W_ij|."""
    return ROUNDING_SLACK * float(np.abs(weights).sum())


def relative_gap(objective: float, lower_bound: float) -> float:
    """(objective - lower_bound) / |objective|; 0 if both are 0, infinite without a bound or a selection."""
    if objective == lower_bound:
        return 0.0
    if objective == 0 or not math.isfinite(objective) or not math.isfinite(lower_bound):
        return math.inf
    return (objective - lower_bound) / abs(objective)


@dataclass(frozen=True)
class Solution:
    """One checked solver run. ``objective`` is recomputed from ``pruned``; NaN when there is no selection.

    ``lower_bound`` is -inf if none. A bound that differs from the objective by rounding only (`ROUNDING_SLACK` of the
    sum of |W_ij| over the pruned channels, or above it by at most `OBJECTIVE_SLACK` of it) becomes the objective.
    """

    problem: str
    digest: str
    n: int
    prune: int
    pruned: tuple[int, ...] | None
    objective: float
    lower_bound: float
    bound_kind: BoundKind
    status: Status
    limit: Limit
    raw_status: str
    nodes: int
    iterations: int
    timing: Timing
    solver: str
    solver_version: str
    seed: int
    threads: int
    options: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    trace: Trace = ()

    @property
    def gap(self) -> float:
        """See `relative_gap`."""
        return relative_gap(self.objective, self.lower_bound)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """The solution that a record tells of, the inverse of `record`."""
        fields = {name: record[name] for name in cls.__dataclass_fields__ if name != "timing"}
        fields |= {
            "pruned": None if record["pruned"] is None else tuple(record["pruned"]),
            "objective": math.nan if record["objective"] is None else record["objective"],
            "lower_bound": -math.inf if record["lower_bound"] is None else record["lower_bound"],
            "bound_kind": BoundKind(record["bound_kind"]),
            "status": Status(record["status"]),
            "limit": Limit(record["limit"]),
            "warnings": tuple(record["warnings"]),
            "trace": tuple(
                (seconds, math.inf if objective is None else objective, -math.inf if bound is None else bound)
                for seconds, objective, bound in record["trace"]
            ),
        }
        return cls(**fields, timing=Timing(**record["timing_ns"]))

    def record(self) -> dict[str, Any]:
        """A JSON object with the field names of the records everywhere; a number that is not finite is null."""
        return {
            "problem": self.problem,
            "pruned": None if self.pruned is None else list(self.pruned),
            "digest": self.digest,
            "n": self.n,
            "prune": self.prune,
            "solver": self.solver,
            "solver_version": self.solver_version,
            "status": self.status.value,
            "limit": self.limit.value,
            "raw_status": self.raw_status,
            "objective": _finite(self.objective),
            "lower_bound": _finite(self.lower_bound),
            "bound_kind": self.bound_kind.value,
            "gap": _finite(self.gap),
            "nodes": self.nodes,
            "iterations": self.iterations,
            "timing_ns": asdict(self.timing),
            "seed": self.seed,
            "threads": self.threads,
            "options": dict(self.options),
            "warnings": list(self.warnings),
            "versions": dict(self.versions),
            "trace": [[_finite(value) for value in point] for point in self.trace],
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
