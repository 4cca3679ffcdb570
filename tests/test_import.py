"""What importing costs, and what cannot be imported together."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_library_loads_neither_torch_nor_a_solver() -> None:
    heavy = "('torch', 'transformers', 'cvxpy', 'ortools', 'grace_solvers', 'matplotlib', 'networkx', 'sklearn')"
    assert run(f"import sys, grace_opt; print([m for m in {heavy} if m in sys.modules])").strip() == "[]"
    assert run(f"import sys, grace_opt.cli; print([m for m in {heavy} if m in sys.modules])").strip() == "[]"


def test_functions_win_over_the_modules_of_their_name() -> None:
    code = "import grace_opt.solve, grace_opt.graphs.calibrate; from grace_opt import solve, calibrate; "
    assert run(code + "print(callable(solve), callable(calibrate), callable(grace_opt.solve))").split() == ["True"] * 3


@pytest.mark.parametrize("order", ["cvxpy, ortools.sat.python.cp_model", "ortools.sat.python.cp_model, cvxpy"])
def test_cvxpy_and_ortools_share_a_process_in_either_order(order: str) -> None:
    code = (
        f"import {order}; import cvxpy; from ortools.math_opt.python import mathopt; print(cvxpy.installed_solvers())"
    )
    assert "HIGHS" in run(code)
    assert "CLARABEL" in run(code)
