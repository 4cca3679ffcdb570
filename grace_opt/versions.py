"""Which versions of what ran: stamped on solutions, and compared before work is sent to another machine."""

from __future__ import annotations

import importlib.metadata
import platform
from functools import cache


@cache
def versions_of(requires: tuple[str, ...]) -> dict[str, str]:
    """Versions of Python, grace-opt, numpy and these distributions; ``not installed`` for one that is not there."""
    versions = {"python": platform.python_version()}
    for name in ("grace-opt", "numpy", *requires):
        versions[name] = distribution_version(name)
    return versions


@cache
def version_of_class(cls: type) -> str:
    """The version of the distribution that a class, e.g. a solver's, comes from."""
    package = cls.__module__.partition(".")[0]
    if package in ("grace_opt", "grace_solvers"):
        return distribution_version("grace-opt")
    names = importlib.metadata.packages_distributions().get(package, [])
    return distribution_version(names[0]) if names else "unknown"


@cache
def distribution_version(name: str) -> str:
    """The version of a distribution, or ``not installed``."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
