"""The documentation says what the code does: the command line's page, the example solver, the links.

The tests also run from a copy of this folder alone, where there is no documentation: then there is nothing to collect.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from grace_opt import BoundKind, Limits, Status, SubsetProblem, registry, solve
from tests.support import ROOT, snippets
from tests.support.slack import assert_encloses

CLI, EXAMPLE = ROOT / "docs" / "generate_cli.py", ROOT / "docs" / "adding-a-solver.md"
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if page.is_file()]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ +(.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[ ]+", "-", re.sub(r"[^\w\- ]", "", title.lower())) for title in titles}


if PAGES:

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_what_a_page_refers_to_exists(page: Path) -> None:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^()\s]+)\)", text):
            path, _, anchor = target.partition("#")
            if ":" in path:  # another site
                continue
            file = page.parent / path if path else page
            assert file.exists(), f"{page.name} refers to {target}"
            if anchor:
                assert anchor in anchors(file), f"{page.name} refers to {target}"
        for path in re.findall(r"`((?:grace_opt|solvers|benchmarks|tests|docs)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


if CLI.is_file():

    def test_the_command_lines_page_is_up_to_date() -> None:
        spec = importlib.util.spec_from_file_location("generate_cli", CLI)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.PAGE.read_text(encoding="utf-8") == module.render(), "run: python docs/generate_cli.py"


if EXAMPLE.is_file():

    def installed(folder: Path) -> str:
        """The page's project in a folder, as pip would leave it there; returns the solver's name."""
        text = EXAMPLE.read_text(encoding="utf-8")
        blocks = dict(re.findall(r"`([\w.]+)`:\n\n```\w+\n(.*?)```", text, flags=re.DOTALL))
        project = tomllib.loads(blocks["pyproject.toml"])["project"]
        ((name, reference),) = project["entry-points"]["grace_opt.solvers"].items()
        (folder / "random_swaps.py").write_text(blocks["random_swaps.py"], encoding="utf-8")
        info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
            f"Summary: {project['description']}\n"
        )
        (info / "entry_points.txt").write_text(f"[grace_opt.solvers]\n{name} = {reference}\n")
        (info / "top_level.txt").write_text("random_swaps\n")
        return str(name)

    def test_the_example_solver_works_as_an_installed_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        name = installed(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delenv("GRACE_OPT_PLUGINS")
        monkeypatch.setitem(sys.modules, "random_swaps", None)  # so that the module is gone again afterwards
        del sys.modules["random_swaps"]

        assert name in [listed.name for listed in registry.solvers()]
        rng = np.random.default_rng(0)
        q, k = rng.normal(size=(4, 12)), rng.normal(size=(6, 12))
        problem = SubsetProblem((q.T @ q) * (k.T @ k), 5, protected=np.arange(12) == 3)
        optimum = solve(problem, "exhaustive")
        found = solve(problem, name, options={"starts": "20"}, limits=Limits(seed=1))
        assert found.status in (Status.FEASIBLE, Status.OPTIMAL)
        assert found.objective == pytest.approx(optimum.objective)
        assert found.bound_kind is BoundKind.PROVEN
        assert_encloses(found, optimum, problem)
        assert found.pruned == solve(problem, name, options={"starts": "20"}, limits=Limits(seed=1)).pruned
        started = solve(problem, name, options={"starts": 1}, warm_start=optimum.pruned)
        assert started.objective <= optimum.objective * (1 + 1e-9)
        assert solve(problem, name, limits=Limits(time_limit=0)).limit == "time"
        nothing = SubsetProblem(np.eye(3), 0, protected=np.ones(3, bool))
        assert solve(nothing, name).pruned == ()

    def test_the_example_solvers_page_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        installed(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setenv("GRACE_OPT_PLUGINS", "random-swaps")
        shown = [block for block in snippets.blocks(EXAMPLE) if block.language == "bash" and "solve " not in block.text]
        assert len(shown) == 2  # the list of solvers, the conformance kit; the tutorial's graphs are not here
        for block in shown:
            printed = snippets.bash(block.text.replace("pip install .\n", ""), tmp_path, EXAMPLE.name)
            assert block.printed is not None
            assert snippets.differs(block.printed, printed) is None, printed
