"""Many problems: threads, processes, crashes, hangs, interruptions; and results of the wrong kind."""

from __future__ import annotations

import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grace_opt import InputError, SubsetProblem, solve, solve_many
from grace_opt.engines import local
from grace_opt.engines.outcome import run_one
from grace_opt.engines.supervisor import Supervisor
from grace_opt.solution import Limit, Limits, Status
from tests.support.faulty import FaultySolver, ShortBatchSolver, problems
from tests.support.patience import PATIENCE, until


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


def test_a_supervisor_is_stopped_by_another_thread(tmp_path: Path) -> None:
    supervisor, begun = Supervisor(), tmp_path / "begun"

    def stop() -> None:
        until(begun.exists, "head 1 is begun")
        supervisor.stop()

    threading.Thread(target=stop).start()
    results = supervisor.solve(FaultySolver("hang", str(begun)), problems(), Limits())
    assert [raw.status for raw, _ in results] == [Status.FEASIBLE, Status.ERROR, Status.ERROR, Status.ERROR]
    assert supervisor.stopped


def test_every_process_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of threads that begin at once, as they do on a busy machine."""
    taken, waited_for = threading.Semaphore(0), threading.Event()
    ended: list[Supervisor] = []

    def begun(pool: ThreadPoolExecutor, function: Any, part: Any) -> Any:
        future: Any = submit(pool, function, part)
        assert taken.acquire(timeout=PATIENCE)
        return future

    def solved(supervisor: Supervisor, solver: Any, heads: Any, limits: Limits) -> Any:
        taken.release()
        assert waited_for.wait(PATIENCE)
        return [run_one(solver, head, limits) for head in heads]

    def completed(futures: Any) -> Any:
        waited_for.set()
        return as_completed(futures)

    def noted(supervisor: Supervisor) -> None:
        ended.append(supervisor)

    submit = ThreadPoolExecutor.submit
    monkeypatch.setattr(ThreadPoolExecutor, "submit", begun)
    monkeypatch.setattr(local, "as_completed", completed)
    monkeypatch.setattr(Supervisor, "solve", solved)
    monkeypatch.setattr(Supervisor, "stop", noted)
    solve_many(problems(2), FaultySolver(), isolate=True, workers=2)
    assert len(ended) == 2


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
    """Two heads are finished and two at work when it comes, while this thread waits for them."""
    seen: list[str] = []
    begun: list[str] = []
    heard = threading.Event()

    class Holding(FaultySolver):
        def solve(self, problem: SubsetProblem, *rest: Any, **more: Any) -> Any:
            begun.append(problem.name)
            assert int(problem.name) < 2 or heard.wait(PATIENCE)
            return super().solve(problem, *rest, **more)

    def hear(*_: Any) -> None:
        heard.set()
        raise KeyboardInterrupt

    def waits() -> bool:
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        return (len(seen), len(begun)) == (2, 4) and frame.f_code.co_name == "wait"

    def interrupt() -> None:
        until(waits, "two heads are finished, two at work")
        os.kill(os.getpid(), signal.SIGINT)

    many = [SubsetProblem(np.eye(2) + index, 1, name=f"{index}") for index in range(60)]
    before = signal.signal(signal.SIGINT, hear)
    try:
        sender = threading.Thread(target=interrupt)
        sender.start()
        with pytest.raises(KeyboardInterrupt):
            solve_many(many, Holding(), workers=2, progress=lambda solution: seen.append(solution.problem))
        sender.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(seen, key=int) == sorted(begun, key=int) == ["0", "1", "2", "3"]


def test_a_solver_that_fails_to_answer_and_too_few_workers() -> None:
    with pytest.raises(InputError, match="solver 'faulty' failed to say whether it takes head 0"):
        solve_many(problems(), FaultySolver("supports"))
    with pytest.raises(InputError, match="workers must be at least 1"):
        solve_many(problems(), "greedy", workers=0)
    assert solve_many([], "greedy") == []
