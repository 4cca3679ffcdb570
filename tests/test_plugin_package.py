"""A third party's solver: a package is built, installed by pip, discovered, and passes the conformance kit.

The package is the one in docs/adding-a-solver.md, and a smaller one for where there is no documentation (the tests of
the wheel run from a copy of this folder alone). Nothing is fetched: where the build back end is not installed, the
wheel is written here.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

DOCS = ROOT / "docs" / "adding-a-solver.md"

SMALL_PACKAGE = {
    "pyproject.toml": """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "lightest-channels"
version = "2.0"
description = "the channels of smallest weight"
dependencies = ["grace-opt"]

[project.entry-points."grace_opt.solvers"]
lightest = "lightest_channels:LightestSolver"
""",
    "lightest_channels.py": '''
"""A solver for grace-opt."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from grace_opt.solution import Capabilities, RawResult


@dataclass(frozen=True)
class LightestSolver:
    """Prunes the channels of smallest W_ii."""

    name: ClassVar[str] = "lightest"
    capabilities: ClassVar[Capabilities] = Capabilities()

    def supports(self, problem):
        return problem.groups is None or "it does not know tied groups"

    def solve(self, problem, limits, warm_start=None, rng=None):
        scores = np.where(problem.contraction.free, np.diagonal(problem.weights), np.inf)
        x = np.zeros(problem.n, bool)
        x[np.argsort(scores, kind="stable")[: problem.prune]] = True
        return RawResult(x)
''',
}

PACKAGES = {"small": SMALL_PACKAGE}
if DOCS.is_file():
    text = DOCS.read_text(encoding="utf-8")
    FILES = dict(re.findall(r"`([\w.]+)`:\n\n```\w+\n(.*?)```", text, flags=re.DOTALL))
    PACKAGES["docs"] = {name: FILES[name] for name in ("pyproject.toml", "random_swaps.py")}
BUILDS = ["by hand"] + (["hatchling"] if importlib.util.find_spec("hatchling") else [])


def wheel_by_hand(files: dict[str, str], folder: Path) -> Path:
    """What the build back end makes of a project of single modules."""
    project = tomllib.loads(files["pyproject.toml"])["project"]
    stem = f"{project['name'].replace('-', '_')}-{project['version']}"
    metadata = {"Metadata-Version": "2.1", "Name": project["name"], "Version": project["version"]}
    metadata["Summary"] = project["description"]
    lines = [f"{field}: {value}" for field, value in metadata.items()]
    lines += [f"Requires-Dist: {requirement}" for requirement in project["dependencies"]]
    entries = [f"{name} = {value}" for name, value in project["entry-points"]["grace_opt.solvers"].items()]
    contents = {name: source for name, source in files.items() if name.endswith(".py")}
    contents[f"{stem}.dist-info/METADATA"] = "\n".join(lines) + "\n"
    contents[f"{stem}.dist-info/WHEEL"] = (
        "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    contents[f"{stem}.dist-info/entry_points.txt"] = "\n".join(["[grace_opt.solvers]", *entries]) + "\n"
    record = []
    for name, content in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
        record.append(f"{name},sha256={digest},{len(content.encode())}\n")
    record.append(f"{stem}.dist-info/RECORD,,\n")
    contents[f"{stem}.dist-info/RECORD"] = "".join(record)
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return wheel


def wheel_by_hatchling(files: dict[str, str], folder: Path) -> Path:
    source = folder / "source"
    source.mkdir()
    for name, content in files.items():
        (source / name).write_text(content, encoding="utf-8")
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    (wheel,) = folder.glob("*.whl")
    return wheel


def pip(*arguments: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(params=[f"{package}, {build}" for package in PACKAGES for build in BUILDS])
def installed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A project's table, and the environment of a process that has its package installed."""
    package, build = request.param.split(", ")
    files = PACKAGES[package]
    wheel = (wheel_by_hatchling if build == "hatchling" else wheel_by_hand)(files, tmp_path)
    site = tmp_path / "site"
    pip("install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    # sys.path too: the tests may run from a checkout that is not installed
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    environment = {name: value for name, value in os.environ.items() if name != "GRACE_OPT_PLUGINS"}
    environment |= {"PYTHONPATH": path, "COLUMNS": "200"}
    return tomllib.loads(files["pyproject.toml"])["project"], environment


def test_a_package_is_discovered_and_passes_the_kit(
    installed: tuple[dict[str, Any], dict[str, str]], tmp_path: Path
) -> None:
    project, environment = installed
    ((name, _),) = project["entry-points"]["grace_opt.solvers"].items()

    def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment | changes, cwd=tmp_path
        )

    listed = run("grace_opt", "solvers", "-f", "json")
    assert listed.returncode == 0, listed.stderr
    (record,) = [record for record in json.loads(listed.stdout)["records"] if record["solver"] == name]
    assert record["origin"] == "plug-in"
    assert record["guarantee"] == project["description"]
    assert f"{project['name']} {project['version']}" in record["needs"]

    conformance = run("grace_opt.testing", name)
    assert conformance.returncode == 0, conformance.stdout + conformance.stderr
    assert f"{name}: passed" in conformance.stdout

    without = run("grace_opt.testing", name, GRACE_OPT_PLUGINS="")
    assert without.returncode == 2
    assert f"unknown solver '{name}'" in without.stderr


if "docs" in PACKAGES:

    def test_the_test_file_in_the_docs_passes(tmp_path: Path) -> None:
        for name in ("random_swaps.py", "test_random_swaps.py"):
            (tmp_path / name).write_text(FILES[name], encoding="utf-8")
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))),
        )
        assert run.returncode == 0, run.stdout + run.stderr
        assert re.search(r"1[0-9] passed", run.stdout)
