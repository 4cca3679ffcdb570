"""How the compiled parts are compiled: once for a machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

_Function = TypeVar("_Function", bound=Callable[..., Any])


def kernel(function: _Function) -> _Function:
    """Compile without the interpreter lock, and keep the code on disk where some folder can be written."""
    return _compiled(function, fastmath=False)


def fast_kernel(function: _Function) -> _Function:
    """As `kernel`; sums may be taken in any order, and no NaN comes in."""
    return _compiled(function, fastmath={"nnan", "nsz", "reassoc", "contract"})


def _compiled(function: _Function, fastmath: Any) -> _Function:
    options = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        compiled: _Function = njit(function, cache=True, **options)
    except RuntimeError:  # numba found no folder for its cache
        compiled = njit(function, **options)
    return compiled
