"""What the machine that runs something decides, and must not."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grace_opt import InputError, Limits, SubsetProblem, solve
from grace_opt.cli.app import run
from grace_opt.models.load import cache_folder
from grace_opt.solution import Limit
from grace_opt.testing.solvers import checks
from tests.support.strategies import gram_weights


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A folder with a package whose solver is described in Japanese."""
    info = tmp_path / "outside-1.dist-info"
    info.mkdir()
    metadata = "Metadata-Version: 2.1\nName: outside\nVersion: 1\nSummary: gr\u00f6\u00dfer \u65e5\u672c\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    (info / "entry_points.txt").write_text("[grace_opt.solvers]\noutside = outside:Outside\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", "gr\\xf6\\xdfer \\u65e5\\u672c"), ("latin-1", "gr\u00f6\u00dfer \\u65e5\\u672c")],
)
def test_what_a_terminal_cannot_show_is_an_escape(encoding: str, shown: str, plugin: Path) -> None:
    path = os.pathsep.join([str(plugin), *filter(None, sys.path)])
    there = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": path, "GRACE_OPT_PLUGINS": "outside"}
    done = subprocess.run([sys.executable, "-m", "grace_opt", "solvers"], env=there, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert shown in " ".join(done.stdout.decode(encoding).split())


def test_utf_8_is_written_as_it_is(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8"))
    monkeypatch.syspath_prepend(plugin)
    monkeypatch.setenv("GRACE_OPT_PLUGINS", "outside")
    assert run(["solvers"]) == 0
    sys.stdout.flush()
    assert "\u65e5\u672c" in written.getvalue().decode()


def test_no_home_folder_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(InputError, match="no home folder .* set XDG_CACHE_HOME"):
        cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "grace-opt"


@pytest.mark.parametrize(("limits", "told"), [(Limits(time_limit=60), Limit.TIME), (Limits(), Limit.INTERRUPTED)])
def test_cp_sat_stops_before_its_time_limit_where_steps_take_long(
    limits: Limits, told: Limit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no interruption, which would end the whole run as Ctrl-C does."""
    from ortools.sat.python import cp_model

    from grace_solvers import miqp
    from grace_solvers.parts.dual import root

    def gives_up(solver: Any, model: Any) -> Any:
        solver.parameters.max_deterministic_time = 0.0  # as if the next step would take too long
        return real(solver, model)

    def loose(core: Any, cutoff: float, deadline: float = np.inf) -> Any:
        return root(core, cutoff + 1e3 * float(np.abs(core.weights).sum()), deadline)

    real = cp_model.CpSolver.solve
    monkeypatch.setattr(cp_model.CpSolver, "solve", gives_up)
    monkeypatch.setattr(miqp, "root", loose)
    problem = SubsetProblem(gram_weights(np.random.default_rng(0), 12, 6, True), 5)
    assert solve(problem, "miqp", options={"backend": "cp-sat"}, limits=limits).limit is told


def test_the_kit_takes_no_time_for_a_solvers_that_others_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second under a limit of half a one, of which others had the processor for most."""
    (check,) = [check for check in checks.CHECKS if check.name == "time-limit"]
    clock, waited = [0.0], [0.0]
    busy = [0.9]

    def slowly(*arguments: Any, **more: Any) -> Any:
        if more.get("limits"):
            clock[0] += 1.5
            waited[0] += busy[0]
        return solve(*arguments, **more)

    monkeypatch.setattr(checks, "solve", slowly)
    monkeypatch.setattr(checks.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(checks, "_waited", lambda: waited[0])
    from grace_opt.registry import create

    solver = create("local-search")
    check(solver)
    busy[0] = 0.1
    with pytest.raises(AssertionError, match="under a time limit"):
        check(solver)
