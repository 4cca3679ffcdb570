"""Many problems: threads, processes, crashes, hangs, interruptions; and results of the wrong kind."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import numpy as np
import pytest

from grace_opt import InputError, SubsetProblem, solve, solve_many
from grace_opt.engines.supervisor import Supervisor
from grace_opt.solution import Limit, Limits, Status
from tests.support.faulty import FaultySolver, ShortBatchSolver, SlowSolver, problems


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


def test_a_solver_that_fails_to_answer_and_too_few_workers() -> None:
    with pytest.raises(InputError, match="solver 'faulty' failed to say whether it takes head 0"):
        solve_many(problems(), FaultySolver("supports"))
    with pytest.raises(InputError, match="workers must be at least 1"):
        solve_many(problems(), "greedy", workers=0)
    assert solve_many([], "greedy") == []
