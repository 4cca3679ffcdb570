"""How the solvers that prove begin: the core of a problem, an incumbent for it, and the clocks they run against."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from grace_opt.problem import BoolArray, SubsetProblem
from grace_opt.solution import BoundKind, Limits, RawResult
from grace_solvers.parts.exchange import iterated_tabu, starts
from grace_solvers.parts.undecided import Core, core_of
from grace_solvers.parts.warmup import ready

CUT_AT = 1e-3  # of the gap tolerance: a selection that is better by less than that may be left out
TABU_ROUNDS = 8


@dataclass(frozen=True, eq=False)
class Opening:
    """What is known before the relaxation. With a core of no nodes there is nothing left to decide."""

    core: Core
    incumbent: BoolArray  #: bool[n]
    value: float  #: its objective, in the core's units
    tolerance: float  #: the gap at which the front end calls it optimal, in the core's units
    began: float  #: time.monotonic()
    clock: int  #: time.perf_counter_ns()
    deadline: float  #: in time.monotonic()'s seconds, or inf

    @property
    def cutoff(self) -> float:
        """What a selection must stay below to be worth finding."""
        return self.value - CUT_AT * self.tolerance

    def decided(self, raw_status: str = "") -> RawResult:
        """The answer where there is nothing to decide."""
        return RawResult(self.incumbent, self.value * self.core.scale, BoundKind.PROVEN, raw_status=raw_status)


def opening(
    problem: SubsetProblem, limits: Limits, warm_start: BoolArray | None, *, rounds: int = TABU_ROUNDS
) -> Opening:
    """The core, and the best of the warm start and the usual starts after tabu search. O(rounds k^2) or so."""
    ready()
    began, clock = time.monotonic(), time.perf_counter_ns()
    deadline = np.inf if limits.time_limit is None else began + limits.time_limit
    core = core_of(problem)
    if core.k == 0:
        return Opening(core, core.expand(np.zeros(0, bool)), core.constant, 0.0, began, clock, deadline)
    known = [] if warm_start is None else [core.contract(warm_start)]
    found = iterated_tabu(core, [*known, *starts(core)], rounds=rounds, seed=limits.seed, deadline=deadline)
    tolerance = max(limits.gap_rel * abs(found.value), limits.gap_abs / core.scale)
    return Opening(core, core.expand(found.y), found.value, tolerance, began, clock, deadline)
