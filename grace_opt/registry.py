"""Solver names -> solvers: a lazy table of built-ins, and third parties' entry points in group grace_opt.solvers.

Listing imports no solver; a solver is imported when it is asked for. A built-in name cannot be taken.
``GRACE_OPT_PLUGINS`` unset loads every plug-in, empty loads none, a comma-separated list loads exactly those.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grace_opt.errors import InputError, did_you_mean
from grace_opt.solution import Solver

ENTRY_POINT_GROUP = "grace_opt.solvers"


@dataclass(frozen=True)
class SolverInfo:
    """What is known of a solver without importing it."""

    name: str
    reference: str
    guarantee: str
    needs: str
    origin: str = "built-in"


#: the solvers that come with grace-opt
BUILT_IN = {
    info.name: info
    for info in (
        SolverInfo(
            "independent",
            "grace_solvers.independent:IndependentSolver",
            "optimal if W is diagonal; ignores interactions (ThinK's scores)",
            "numpy",
        ),
        SolverInfo(
            "greedy",
            "grace_solvers.greedy:GreedySolver",
            "each step is the cheapest one; no bound (GRACE's MIES; forward, backward or the better of both)",
            "numpy",
        ),
        SolverInfo(
            "local-search",
            "grace_solvers.local_search:LocalSearchSolver",
            "never worse than greedy in either direction; tabu search over exchanges; no bound",
            "numba, scipy",
        ),
        SolverInfo(
            "branch-and-bound",
            "grace_solvers.branch_and_bound:BranchAndBoundSolver",
            "the optimum, proven; under a limit the best selection and bound so far",
            "numba, scipy",
        ),
        SolverInfo(
            "auto",
            "grace_solvers.auto:AutoSolver",
            "branch-and-bound where it can prove something, local-search elsewhere; says which",
            "numba, scipy",
        ),
        SolverInfo(
            "spectral",
            "grace_solvers.spectral:SpectralSolver",
            "rounds the relaxation on a sphere (eigenvalues); its lower bound is proven",
            "numba, scipy",
        ),
        SolverInfo(
            "sdp",
            "grace_solvers.sdp:SDPSolver",
            "rounds a semidefinite relaxation (CVXPY); its lower bound is proven",
            "cvxpy, numba, scipy",
        ),
        SolverInfo(
            "miqp",
            "grace_solvers.miqp:MIQPSolver",
            "the optimum as OR-Tools claims it (SCIP), proven up to 40 undecided nodes (CP-SAT)",
            "ortools, numba, scipy",
        ),
        SolverInfo(
            "exhaustive",
            "grace_solvers.exhaustive:ExhaustiveSolver",
            "the optimum, proven by enumeration; at most 20 prunable nodes",
            "numpy",
        ),
    )
}


def solvers() -> list[SolverInfo]:
    """All known solvers, built-ins first, then plug-ins by name. Imports none of them."""
    return [*BUILT_IN.values(), *(_plugin_info(point) for point in _plugins().values())]


def create(name: str, options: Mapping[str, Any] | None = None) -> Solver:
    """The solver called ``name`` with its options set.

    Raises:
        InputError: for an unknown name or option (with the nearest known one), a value of the wrong type, a package
            that the solver needs and is not installed, or a plug-in that cannot be imported.
    """
    solver_class = _load(name)
    fields = {f.name: f for f in dataclasses.fields(solver_class) if f.init}
    for option in options or {}:
        if option not in fields:
            raise InputError(f"solver {name!r} has no option {option!r}{did_you_mean(option, fields)}")
    # pydantic turns the command line's strings into the field's type and checks choices.
    from pydantic import TypeAdapter, ValidationError

    try:
        solver: Solver = TypeAdapter(solver_class).validate_python(dict(options or {}))
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(map(str, first["loc"]))
        raise InputError(f"solver {name!r}, option {option!r}: {first['msg']}, got {first['input']!r}") from None
    for package in solver.capabilities.requires:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise InputError(_missing(name, package)) from None
    return solver


def _missing(name: str, package: str) -> str:
    return f"solver {name!r} needs {package}, which is not installed here; pip install {package}"


def _load(name: str) -> Any:
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].reference.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            raise InputError(_missing(name, error.name or str(error))) from error
    plugins = _plugins()
    if name not in plugins:
        raise InputError(f"unknown solver {name!r}{did_you_mean(name, [*BUILT_IN, *plugins])}")
    point = plugins[name]
    try:
        solver_class = point.load()
    except Exception as error:  # a plug-in may fail in any way; the others must keep working
        raise InputError(
            f"solver {name!r} ({point.value}, from {_distribution(point)}) cannot be imported: {error!r}; "
            "repair or uninstall that package"
        ) from error
    if not dataclasses.is_dataclass(solver_class) or not callable(getattr(solver_class, "solve", None)):
        raise InputError(f"solver {name!r} ({point.value}) must be a dataclass with a method solve(); see the docs")
    return solver_class


def _plugins() -> dict[str, importlib.metadata.EntryPoint]:
    chosen = os.environ.get("GRACE_OPT_PLUGINS")
    wanted = None if chosen is None else {part.strip() for part in chosen.split(",") if part.strip()}
    found: dict[str, importlib.metadata.EntryPoint] = {}
    # The order of entry_points() is no contract: sort, so that a clash is decided the same way everywhere.
    for point in sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda p: (p.name, p.value)):
        if wanted is not None and point.name not in wanted:
            continue
        if not point.name.replace("-", "_").isidentifier():
            warnings.warn(f"solver plug-in {point.name!r} ({point.value}) ignored: not a valid name", stacklevel=3)
        elif point.name in BUILT_IN or point.name in found:
            warnings.warn(f"solver plug-in {point.name!r} ({point.value}) ignored: the name is taken", stacklevel=3)
        else:
            found[point.name] = point
    return found


def _plugin_info(point: importlib.metadata.EntryPoint) -> SolverInfo:
    summary = point.dist.metadata["Summary"] if point.dist else None
    return SolverInfo(point.name, point.value, summary or "not stated", _distribution(point), "plug-in")


def _distribution(point: importlib.metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"
