"""What importing costs, and what cannot be imported together."""

from __future__ import annotations

import subprocess
import sys

import pytest

import grace_opt


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


HEAVY = (
    *("torch", "transformers", "cvxpy", "ortools", "grace_solvers", "matplotlib", "networkx", "sklearn"),
    *("numpy", "scipy", "pydantic", "rich", "dask", "distributed", "fastapi", "sqlalchemy", "httpx", "safetensors"),
)


@pytest.mark.parametrize("module", ["grace_opt", "grace_opt.cli", "grace_opt.cli.app", "grace_opt.__main__"])
def test_importing_the_library_or_all_commands_loads_nothing_heavy(module: str) -> None:
    assert run(f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])").strip() == "[]"


@pytest.mark.parametrize("arguments", ["--help", "solve --help", "--version", "solve absent --ratio 0.5 --nonsense"])
def test_the_command_line_answers_without_loading_what_computes(arguments: str) -> None:
    code = (
        "import sys; from grace_opt.cli import main; sys.argv[1:] = "
        f"{arguments.split()}\ntry: main()\nexcept SystemExit: pass\n"
        f"print([m for m in {HEAVY} if m in sys.modules and m not in ('rich', 'pydantic')])"  # Typer uses both
    )
    assert run(code).splitlines()[-1] == "[]"


def test_importing_the_front_end_loads_neither_torch_nor_a_solver() -> None:
    heavy = HEAVY[: HEAVY.index("numpy")]
    code = "from grace_opt import solve, load_bundle, calibrate, load_model, Limits, Budget, METHODS; import sys; "
    assert run(code + f"print([m for m in {heavy} if m in sys.modules])").strip() == "[]"


def test_the_package_gives_all_that_it_exports() -> None:
    for name in grace_opt.__all__:
        assert getattr(grace_opt, name) is not None
    assert set(grace_opt.__all__) <= set(dir(grace_opt))
    assert {name for names in grace_opt._EXPORTS.values() for name in names} == {*grace_opt.__all__} - {"__version__"}
    assert run("import grace_opt; print(grace_opt.registry.create('greedy').name)").strip() == "greedy"
    assert run("from grace_opt import *; print(callable(solve), Limits().seed)").split() == ["True", "0"]
    with pytest.raises(AttributeError, match="no attribute 'sovle'"):
        grace_opt.sovle  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    "first", ["import grace_opt.solve, grace_opt.graphs.calibrate", "import grace_opt.cli.app", "import grace_opt"]
)
def test_functions_win_over_the_modules_of_their_name(first: str) -> None:
    code = f"{first}\nimport grace_opt, types\nbefore = grace_opt.solve, grace_opt.calibrate\n"
    code += "import grace_opt.solve, grace_opt.cli.solve\nfrom grace_opt import solve, calibrate\n"
    code += "print(*(isinstance(f, types.FunctionType) for f in (*before, solve, calibrate, grace_opt.solve)))"
    assert run(code).split() == ["True"] * 5


@pytest.mark.parametrize("order", ["cvxpy, ortools.sat.python.cp_model", "ortools.sat.python.cp_model, cvxpy"])
def test_cvxpy_and_ortools_share_a_process_in_either_order(order: str) -> None:
    code = (
        f"import {order}; import cvxpy; from ortools.math_opt.python import mathopt; print(cvxpy.installed_solvers())"
    )
    assert "HIGHS" in run(code)
    assert "CLARABEL" in run(code)
