"""What a run has to solve: its request and its bundle made into problems and solvers."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from grace_opt.compare import Instance, instances_of
from grace_opt.compression.budget import Budget
from grace_opt.compression.from_bundle import require_effect
from grace_opt.compression.method import Method, method
from grace_opt.errors import InputError
from grace_opt.graphs import GraphBundle, load_bundle
from grace_opt.registry import create
from grace_opt.service.db.blobs import BlobStore
from grace_opt.solution import Limits, Solver

#: Options of a method that say how a prompt is compressed, where the bundle and the run's solvers say it already.
#: Field of a request's config -> the method's option that says the same.
CONFIGURED = {"protect": "protection", "recent_window": "recent_window", "sinks": "sinks"}


@dataclass(eq=False)
class Work:
    """One run: what is to be solved yet, and where each result belongs."""

    request: Mapping[str, Any]
    bundle: GraphBundle
    limits: Limits
    solvers: list[Solver]
    instances: list[Instance]
    equal: dict[str, list[Instance]]  #: by digest: a problem may come at several budgets, or under several names
    waiting: deque[tuple[Solver, list[Instance]]] = field(default_factory=deque)
    done: int = 0

    @property
    def total(self) -> int:
        """Records of the complete run."""
        return len(self.instances) * len(self.solvers)


def plan(blobs: BlobStore, request: Mapping[str, Any]) -> Work:
    """A request's heads and solvers. Raises InputError for whatever is wrong with it or with its bundle."""
    made = method_of(request)
    bundle = bundle_of(blobs, request["bundle"])
    solvers = [create(each["solver"], each["options"]) for each in request["solvers"]]
    if request["value_ratio"] and all(head.kind == "key" for head in bundle.heads):
        raise InputError("the bundle has no graphs of values for value_ratio; calibrate with --value-objective")
    instances = instances_of({request["bundle"]: bundle}, budgets_of(request), made)
    equal = defaultdict(list)
    for instance in instances:
        equal[instance.digest].append(instance)
    return Work(request, bundle, Limits(**request["limits"]), solvers, instances, equal)


def method_of(request: Mapping[str, Any]) -> Method:
    """The method of a request, with what its ``config`` says. Raises InputError for what is unknown or said twice."""
    options = dict(request["method_options"])
    if "offline_solver" in options:
        raise InputError("the method's option offline_solver has no effect on a run; name its solvers")
    for name, option in CONFIGURED.items():
        value = request["config"][name]
        if value is None:
            continue
        if option in options:
            raise InputError(f"config.{name} and the method's option {option} say the same; give one of them")
        options[option] = ("default" if value else None) if name == "protect" else value
    made = method(request["method"], options)
    require_effect(made, request["method_options"], [Budget(bytes_per_token=each) for each in request["budget_bytes"]])
    if request["config"]["readout"] == "static" and made.readout.readout_fit == "none":
        raise InputError(f"the method {request['method']!r} has no read-out that could be static; leave readout out")
    return made


def windows_of(request: Mapping[str, Any]) -> dict[str, int]:
    """The windows of the masks that a request names; the graphs' own hold for the others."""
    said = {option for name, option in CONFIGURED.items() if request["config"][name] is not None}
    windows = method_of(request).windows
    names = {"recent_window", "sinks"} & (said | set(request["method_options"]))
    return {name: getattr(windows, name) for name in names}


def budgets_of(request: Mapping[str, Any]) -> list[float | Budget]:
    """A request's budgets, as `instances_of` takes them: a number is a ratio of keys and values."""
    values = request["value_ratio"]
    ratios = [ratio if values is None else Budget(ratio, values) for ratio in request["ratios"]]
    return [*ratios, *(Budget(bytes_per_token=size) for size in request["budget_bytes"])]


def bundle_of(blobs: BlobStore, digest: str) -> GraphBundle:
    """A bundle by its digest. Raises InputError if its file is lost or damaged."""
    if blobs.path(digest).exists() and not blobs.is_sound(digest):
        raise InputError(f"the file of bundle {digest} is damaged in the service's data folder; upload it again")
    return load_once(str(blobs.path(digest)))


@lru_cache(maxsize=4)
def load_once(path: str) -> GraphBundle:
    """A bundle's file; the last few are kept in memory."""
    return load_bundle(path)
