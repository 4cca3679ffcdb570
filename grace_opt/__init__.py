"""grace-opt: choose which channels of a key/value cache to drop, prove how good the choice is, and apply it.

Importing it loads neither torch nor a solver. The cache itself is in `grace_opt.runtime`, which loads torch when it is
first used.
"""

from types import ModuleType

from grace_opt.compression.mask import KVMask, load_mask, mask_from_solutions, save_mask
from grace_opt.errors import InputError
from grace_opt.graphs import GraphBundle, HeadGraph, Protection, load_bundle, salient_channels, save_bundle
from grace_opt.graphs.calibrate import Calibration, calibrate
from grace_opt.models.load import load_model
from grace_opt.problem import SubsetProblem
from grace_opt.solution import BoundKind, Limit, Limits, Solution, Status, Timing
from grace_opt.solve import solve, solve_many

__version__ = "0.1.0"

__all__ = [
    "BoundKind",
    "Calibration",
    "GraphBundle",
    "HeadGraph",
    "InputError",
    "KVMask",
    "Limit",
    "Limits",
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
    "salient_channels",
    "save_bundle",
    "save_mask",
    "solve",
    "solve_many",
]


def __getattr__(name: str) -> ModuleType:
    if name == "runtime":
        import importlib

        return importlib.import_module("grace_opt.runtime")
    raise AttributeError(f"module 'grace_opt' has no attribute {name!r}")
