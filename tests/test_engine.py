"""Many problems: threads, processes, crashes, hangs, interruptions; and results of the wrong kind."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from grace_opt import InputError, SubsetProblem, solve, solve_many
from grace_opt.engines.local import Supervisor
from grace_opt.solution import Capabilities, Limit, Limits, RawResult, Status


def problems(count: int = 4) -> list[SubsetProblem]:
    rng = np.random.default_rng(3)
    factors = rng.standard_normal((count, 12, 12))
    return [SubsetProblem(f @ f.T, 5, name=f"head {index}") for index, f in enumerate(factors)]


@dataclass(frozen=True)
class FaultySolver:
    """Prunes the first channels, and does something bad to head 1."""

    fault: str = "none"

    name: ClassVar[str] = "faulty"
    capabilities: ClassVar[Capabilities] = Capabilities(time_limit=True)

    def supports(self, problem: SubsetProblem) -> Any:
        if self.fault == "supports":
            raise RuntimeError("who knows")
        return True

    def solve(self, problem: SubsetProblem, limits: Limits, warm_start: Any = None, rng: Any = None) -> Any:
        x = np.zeros(problem.n, bool)
        x[: problem.prune] = True
        if problem.name != "head 1":
            return RawResult(x)
        match self.fault:
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit":
                os._exit(3)
            case "hang":
                while True:
                    time.sleep(0.01)
            case "raise":
                raise ValueError("native code")
            case "unpicklable":
                return threading.Lock()
            case "interrupted":
                return RawResult(x, limit=Limit.INTERRUPTED)
        results: dict[str, Any] = {
            "nothing": None,
            "words": RawResult("all of them"),  # type: ignore[arg-type]
            "no bound": RawResult(x, lower_bound=None, bound_kind="proven"),  # type: ignore[arg-type]
            "odd status": RawResult(None, status="splendid"),  # type: ignore[arg-type]
        }
        return results.get(self.fault, RawResult(x))


@dataclass(frozen=True)
class ShortBatchSolver(FaultySolver):
    """Loses a result."""

    capabilities: ClassVar[Capabilities] = Capabilities(batched=True)

    def solve_batch(self, problems: Any, limits: Limits) -> list[Any]:
        return [self.solve(problem, limits) for problem in problems[1:]]


@pytest.mark.parametrize("fault", ["nothing", "words", "no bound", "odd status", "raise", "unpicklable"])
@pytest.mark.parametrize("isolate", [False, True])
def test_a_result_of_the_wrong_kind_is_an_error_of_its_head(fault: str, isolate: bool) -> None:
    solutions = solve_many(problems(), FaultySolver(fault), isolate=isolate)
    assert [s.status for s in solutions] == [Status.FEASIBLE, Status.ERROR, Status.FEASIBLE, Status.FEASIBLE]
    assert solutions[1].warnings
    assert solutions[1].record()["objective"] is None


@pytest.mark.parametrize(("fault", "said"), [("crash", "exit code -11"), ("exit", "exit code 3")])
def test_a_crash_ends_its_head_only(fault: str, said: str) -> None:
    solutions = solve_many(problems(), FaultySolver(fault), isolate=True, workers=2)
    assert [s.status for s in solutions] == [Status.FEASIBLE, Status.ERROR, Status.FEASIBLE, Status.FEASIBLE]
    assert said in solutions[1].warnings[0]


def test_a_solver_that_never_returns_is_killed() -> None:
    seen = []
    limits = Limits(time_limit=0.3)
    solutions = solve_many(
        problems(), FaultySolver("hang"), limits=limits, isolate=True, workers=2, progress=seen.append
    )
    assert [s.status for s in solutions] == [Status.FEASIBLE, Status.NO_SOLUTION, Status.FEASIBLE, Status.FEASIBLE]
    assert solutions[1].limit is Limit.TIME
    assert "killed" in solutions[1].warnings[0]
    assert {s.problem for s in seen} == {p.name for p in problems()}


def test_a_supervisor_is_stopped_by_another_thread() -> None:
    supervisor = Supervisor()
    threading.Timer(1.5, supervisor.stop).start()
    results = supervisor.solve(FaultySolver("hang"), problems(), Limits())
    assert [raw.status for raw, _ in results] == [Status.FEASIBLE, Status.ERROR, Status.ERROR, Status.ERROR]
    assert supervisor.stopped


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"isolate": True, "workers": 2}])
@pytest.mark.parametrize("solver", ["branch-and-bound", "local-search"])
def test_every_way_gives_the_same_selections(solver: str, options: dict[str, Any]) -> None:
    expected = [solve(problem, solver).pruned for problem in problems(8)]
    assert [s.pruned for s in solve_many(problems(8), solver, **options)] == expected


def test_a_batch_that_loses_a_result_is_an_error() -> None:
    assert {s.status for s in solve_many(problems(), ShortBatchSolver())} == {Status.ERROR}


def test_what_was_finished_before_an_interruption_was_heard_of() -> None:
    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        solve_many(problems(), FaultySolver("interrupted"), progress=lambda s: seen.append(s.problem))
    assert seen == ["head 0", "head 1"]


def test_ctrl_c_keeps_what_threads_are_at_work_on() -> None:
    seen: list[str] = []

    def interrupt(solution: Any) -> None:
        seen.append(solution.problem)
        if len(seen) == 1:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()

    many = [SubsetProblem(np.eye(2) + index, 1, name=f"{index}") for index in range(60)]
    with pytest.raises(KeyboardInterrupt):
        solve_many(many, SlowSolver(), workers=2, progress=interrupt)
    assert 2 <= len(seen) < 60


@dataclass(frozen=True)
class SlowSolver(FaultySolver):
    """A tenth of a second each."""

    def solve(self, problem: SubsetProblem, limits: Limits, warm_start: Any = None, rng: Any = None) -> Any:
        time.sleep(0.1)
        return super().solve(problem, limits)


def test_a_solver_that_fails_to_answer_and_too_few_workers() -> None:
    with pytest.raises(InputError, match="solver 'faulty' failed to say whether it takes head 0"):
        solve_many(problems(), FaultySolver("supports"))
    with pytest.raises(InputError, match="workers must be at least 1"):
        solve_many(problems(), "greedy", workers=0)
    assert solve_many([], "greedy") == []
