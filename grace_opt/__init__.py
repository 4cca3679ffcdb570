"""grace-opt: choose which channels of a key/value cache to drop, prove how good the choice is, and apply it.

Importing it loads nothing else: what it exports, and its modules, are imported when they are first asked for.
"""

from __future__ import annotations

import importlib
import sys

TYPE_CHECKING = False  # the command line starts with this module; typing takes most of the time that it had
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

    from grace_opt import runtime as runtime
else:
    ModuleType = type(sys)

if TYPE_CHECKING:
    from grace_opt.compression.budget import Budget
    from grace_opt.compression.from_bundle import mask_from_solutions, problems_of
    from grace_opt.compression.mask import KVMask
    from grace_opt.compression.mask_file import load_mask, save_mask
    from grace_opt.compression.method import METHODS, Method
    from grace_opt.errors import InputError
    from grace_opt.graphs import GraphBundle, HeadGraph, Protection, load_bundle, salient_channels, save_bundle
    from grace_opt.graphs.calibrate import Calibration, calibrate
    from grace_opt.models.load import load_model
    from grace_opt.problem import SubsetProblem
    from grace_opt.solution import BoundKind, Limit, Limits, Solution, Status, Timing
    from grace_opt.solve import solve, solve_many

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "BoundKind",
    "Budget",
    "Calibration",
    "GraphBundle",
    "HeadGraph",
    "InputError",
    "KVMask",
    "Limit",
    "Limits",
    "Method",
    "Protection",
    "Solution",
    "Status",
    "SubsetProblem",
    "Timing",
    "__version__",
    "calibrate",
    "load_bundle",
    "load_mask",
    "load_model",
    "mask_from_solutions",
    "problems_of",
    "salient_channels",
    "save_bundle",
    "save_mask",
    "solve",
    "solve_many",
]

#: module -> what is exported of it; tests/test_import.py checks it against __all__
_EXPORTS = {
    "compression.from_bundle": ("mask_from_solutions", "problems_of"),
    "compression.budget": ("Budget",),
    "compression.mask": ("KVMask",),
    "compression.mask_file": ("load_mask", "save_mask"),
    "compression.method": ("METHODS", "Method"),
    "errors": ("InputError",),
    "graphs": ("GraphBundle", "HeadGraph", "Protection", "load_bundle", "salient_channels", "save_bundle"),
    "graphs.calibrate": ("Calibration", "calibrate"),
    "models.load": ("load_model",),
    "problem": ("SubsetProblem",),
    "solution": ("BoundKind", "Limit", "Limits", "Solution", "Status", "Timing"),
    "solve": ("solve", "solve_many"),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}
_MODULES = ("compression", "evaluate", "graphs", "problem", "registry", "runtime", "solution", "testing")

if not TYPE_CHECKING:  # so that type checkers still refuse a name that is not there

    def __getattr__(name: str) -> Any:
        if name in _MODULE_OF:
            value = getattr(importlib.import_module(f"grace_opt.{_MODULE_OF[name]}"), name)
            globals()[name] = value  # not asked for again
            return value
        if name in _MODULES:
            return importlib.import_module(f"grace_opt.{name}")
        raise AttributeError(f"module 'grace_opt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


class _Package(ModuleType):
    """A module whose exports are not replaced by the modules of their name: `grace_opt.solve` is the function.

    Importing the module ``grace_opt.solve`` would bind its name here.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
