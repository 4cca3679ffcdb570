"""What a run has to solve: its request and its bundle made into problems and solvers."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from grace_opt.compare import Instance, instances_of
from grace_opt.compression.method import method
from grace_opt.graphs import GraphBundle, load_bundle
from grace_opt.registry import create
from grace_opt.service.db.blobs import BlobStore
from grace_opt.solution import Limits, Solver


@dataclass(eq=False)
class Work:
    """One run: what is to be solved yet, and where each result belongs."""

    request: Mapping[str, Any]
    bundle: GraphBundle
    limits: Limits
    solvers: list[Solver]
    instances: list[Instance]
    equal: dict[str, list[Instance]]  #: by digest: a problem may come at several ratios, or under several names
    waiting: deque[tuple[Solver, list[Instance]]] = field(default_factory=deque)
    done: int = 0

    @property
    def total(self) -> int:
        """Records of the complete run."""
        return len(self.instances) * len(self.solvers)


def plan(blobs: BlobStore, request: Mapping[str, Any]) -> Work:
    """A request's heads and solvers. Raises InputError for whatever is wrong with it or with its bundle."""
    bundle = bundle_of(blobs, request["bundle"])
    solvers = [create(each["solver"], each["options"]) for each in request["solvers"]]
    protection = "default" if request["config"]["protect"] else "none"
    uniform = method("grace-opt", {"budget": "uniform", "protection": protection})
    instances = instances_of({request["bundle"]: bundle}, request["ratios"], uniform)
    equal = defaultdict(list)
    for instance in instances:
        equal[instance.digest].append(instance)
    return Work(request, bundle, Limits(**request["limits"]), solvers, instances, equal)


def bundle_of(blobs: BlobStore, digest: str) -> GraphBundle:
    """A bundle by its digest. Raises InputError if its file is lost or damaged."""
    return load_once(str(blobs.path(digest)))


@lru_cache(maxsize=4)
def load_once(path: str) -> GraphBundle:
    """A bundle's file; the last few are kept in memory."""
    return load_bundle(path)
