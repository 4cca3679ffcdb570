"""Third parties' solvers are found, listed without being imported, and cannot break the others."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from grace_opt import InputError, SubsetProblem, registry, solve

PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar
import numpy as np
from grace_opt.solution import Capabilities, RawResult

@dataclass(frozen=True)
class LastSolver:
    """Prunes the last channels."""
    step: int = 1
    name: ClassVar[str] = "last"
    capabilities: ClassVar[Capabilities] = Capabilities()
    def supports(self, problem):
        return problem.groups is None or "it does not know tied groups"
    def solve(self, problem, limits, warm_start=None, rng=None):
        x = np.zeros(problem.n, bool)
        x[np.flatnonzero(problem.contraction.free)[::-1][: problem.prune]] = True
        return RawResult(x)
'''


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, entries: dict[str, str]) -> None:
    """A distribution on the path, as an installer leaves it."""
    (folder / "lastsolver.py").write_text(PLUGIN)
    (folder / "brokensolver.py").write_text("raise OSError('no licence')")
    info = folder / "last_solver-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: last-solver\nVersion: 1.2\nSummary: nothing at all\n")
    lines = "".join(f"{name} = {value}\n" for name, value in entries.items())
    (info / "entry_points.txt").write_text(f"[grace_opt.solvers]\n{lines}")
    (info / "top_level.txt").write_text("lastsolver\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delenv("GRACE_OPT_PLUGINS")


def test_a_plugin_is_listed_without_import_and_then_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, {"last": "lastsolver:LastSolver", "broken": "brokensolver:Nothing"})
    sys.modules.pop("lastsolver", None)
    listed = {info.name: info for info in registry.solvers()}
    assert list(listed)[: len(registry.BUILT_IN)] == list(registry.BUILT_IN)
    assert listed["last"].origin == "plug-in"
    assert listed["last"].needs == "last-solver 1.2"
    assert listed["last"].guarantee == "nothing at all"
    assert "lastsolver" not in sys.modules

    problem = SubsetProblem(np.diag(np.arange(1.0, 6.0)), 2, protected=np.array([0, 0, 0, 0, 1]))
    solution = solve(problem, "last", options={"step": 2})
    assert solution.pruned == (2, 3)
    assert solution.objective == 7.0
    assert solution.solver_version == "1.2"
    assert solution.options == {"step": 2}
    with pytest.raises(InputError, match=r"cannot be imported: OSError\('no licence'\)"):
        solve(problem, "broken")
    with pytest.raises(InputError, match="does not know tied groups"):
        solve(SubsetProblem(np.eye(4), 2, groups=np.array([0, 0, 1, 1])), "last")


def test_built_in_names_cannot_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, {"greedy": "lastsolver:LastSolver", "not a name": "lastsolver:LastSolver"})
    with pytest.warns(UserWarning, match="ignored") as caught:
        listed = registry.solvers()
    assert len(caught) == 2
    assert [info.origin for info in listed] == ["built-in"] * len(registry.BUILT_IN)
    assert type(registry.create("greedy")).__module__ == "grace_solvers.greedy"


def test_the_environment_chooses_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, {"last": "lastsolver:LastSolver", "other": "lastsolver:LastSolver"})
    for chosen, expected in (("", []), ("other", ["other"]), ("last, other", ["last", "other"])):
        monkeypatch.setenv("GRACE_OPT_PLUGINS", chosen)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert [info.name for info in registry.solvers()][len(registry.BUILT_IN) :] == expected


def test_a_solver_whose_package_is_missing_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, {"last": "lastsolver:LastSolver"})
    source = PLUGIN.replace("Capabilities()", "Capabilities(requires=('no-such-distribution',))")
    (tmp_path / "lastsolver.py").write_text(source)
    sys.modules.pop("lastsolver", None)
    with pytest.raises(InputError, match="solver 'last' needs no-such-distribution, which is not installed here"):
        registry.create("last")
    monkeypatch.setitem(sys.modules, "numba", None)
    for module in [name for name in sys.modules if name.startswith("grace_solvers")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(InputError, match="solver 'branch-and-bound' needs numba, which is not installed here"):
        registry.create("branch-and-bound")
