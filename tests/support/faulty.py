"""Solvers that do something bad, or take their time."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from grace_opt import SubsetProblem
from grace_opt.solution import Capabilities, Limit, Limits, RawResult


def problems(count: int = 4) -> list[SubsetProblem]:
    rng = np.random.default_rng(3)
    factors = rng.standard_normal((count, 12, 12))
    return [SubsetProblem(f @ f.T, 5, name=f"head {index}") for index, f in enumerate(factors)]


@dataclass(frozen=True)
class FaultySolver:
    """Prunes the first channels, and does something bad to head 1."""

    fault: str = "none"
    begun: str = ""  #: a file that appears when head 1 hangs

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
                if self.begun:
                    Path(self.begun).touch()
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


@dataclass(frozen=True)
class HoldingSolver(FaultySolver):
    """Leaves the file ``begun`` in a folder, and waits until there is one called ``go``."""

    folder: str = ""

    def solve(self, problem: SubsetProblem, limits: Limits, warm_start: Any = None, rng: Any = None) -> Any:
        Path(self.folder, "begun").touch()
        while not Path(self.folder, "go").exists():
            time.sleep(0.01)
        return super().solve(problem, limits)
