"""The same solver in a new process: same seed, same selection, whatever the hash seed."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from grace_opt.solution import Limits, Solver
from grace_opt.solve import solve
from grace_opt.testing.solvers.cases import hidden_optimum, problems

TIMEOUT = 120.0


def selections(solver: Solver, seed: int) -> dict[str, list[int] | None]:
    """What a solver selects on every fourth case that it takes and on a larger problem where seeds matter."""
    selected = {}
    for case in [*problems()[::4], hidden_optimum(18)]:
        if solver.supports(case.problem) is True:
            pruned = solve(case.problem, solver, limits=Limits(seed=seed)).pruned
            selected[case.name] = None if pruned is None else list(pruned)
    return selected


def selections_in_new_process(solver: Solver, seed: int, hash_seed: int) -> dict[str, list[int] | None]:
    """The same from a new interpreter. Raises AssertionError if the solver cannot be made again there."""
    solver_class = type(solver)
    if "<locals>" in solver_class.__qualname__:
        raise AssertionError(f"{solver_class.__qualname__} must stand at the top level of a module to be made again")
    task = {
        "module": solver_class.__module__,
        "file": getattr(sys.modules.get(solver_class.__module__), "__file__", None),
        "class": solver_class.__qualname__,
        "options": to_jsonable_python(
            {f.name: getattr(solver, f.name) for f in dataclasses.fields(solver) if f.init}  # type: ignore[arg-type]
        ),
        "seed": seed,
    }
    environment = dict(os.environ, PYTHONHASHSEED=str(hash_seed), PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    try:
        run = subprocess.run(
            [sys.executable, "-m", "grace_opt.testing.solvers.replay"],
            input=json.dumps(task),
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the solver did not finish within {TIMEOUT:.0f} s in a new process") from None
    if run.returncode:
        raise AssertionError(f"the solver failed in a new process: {(run.stderr.splitlines() or [''])[-1]}")
    answer: dict[str, list[int] | None] = json.loads(run.stdout.splitlines()[-1])
    return answer


def _rebuilt(task: dict[str, Any]) -> Solver:
    try:
        found: Any = importlib.import_module(task["module"] if task["module"] != "__main__" else "")
    except (ImportError, ValueError):  # a script, or a test file that its runner imported by path
        spec = importlib.util.spec_from_file_location("grace_opt_replayed", task["file"])
        if spec is None or spec.loader is None:
            raise
        found = sys.modules["grace_opt_replayed"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    for part in task["class"].split("."):
        found = getattr(found, part)
    solver: Solver = TypeAdapter(found).validate_python(task["options"])  # as grace_opt.registry does
    return solver


if __name__ == "__main__":
    task = json.load(sys.stdin)
    print(json.dumps(selections(_rebuilt(task), task["seed"])))
