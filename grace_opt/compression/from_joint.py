"""From a calibrated bundle's joint Gram matrices to a mask of joint ranks: in closed form, with nothing to solve."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from grace_opt.compression.budget import Allotment, Budget, within_share
from grace_opt.compression.from_bundle import ITEMSIZE, about_model, shapes_of, windows_of
from grace_opt.compression.method import Method
from grace_opt.errors import InputError
from grace_opt.graphs.bundle import GraphBundle
from grace_opt.heads import KINDS, HeadName, Kind
from grace_opt.problem import FloatArray, SubsetProblem

if TYPE_CHECKING:  # torch is loaded for masks only
    from grace_opt.compression.mask import KVMask
    from grace_opt.compression.plan import LayerPlan

_NOTHING = 1e-8  # of the mean eigenvalue: below it is what no token has shown


def joint_mask(
    bundle: GraphBundle,
    method: Method,
    budget: Budget,
    *,
    recent_window: int | None = None,
    sinks: int | None = None,
) -> KVMask:
    """The mask of joint ranks of a method such as ``cskv``, of a bundle calibrated with ``lowrank``.

    Ranks are uniform, or shared over layers where another number saves most (`Sharing`). Windows are the graphs', if
    left out; a budget in bytes or a share is of a cache of 16-bit numbers, the factors counted. O(layers (H n)^3).

    Raises InputError for a bundle without these matrices, a budget that cannot be reached, and a rank for which the
    text had too few tokens.
    """
    made = _Layers(bundle, method, budget, recent_window, sinks)
    if budget.share is not None:
        from grace_opt.compression.pays import held_bytes

        def held(tried: Budget) -> float:
            return sum(held_bytes(plan, made.shapes, budget.tokens, ITEMSIZE) for plan in made.plans(tried).values())

        full = budget.tokens * len(made.layers) * ITEMSIZE * sum(map(math.prod, made.shapes.values()))
        budget = within_share(budget, held, made.whole, full)
    return made.mask(budget)


class _Layers:
    """The eigenvectors of a bundle's layers, once for all budgets."""

    def __init__(
        self, bundle: GraphBundle, method: Method, budget: Budget, recent_window: int | None, sinks: int | None
    ) -> None:
        from torch import from_numpy

        from grace_opt.compression.cskv import principal

        self.bundle, self.method = bundle, method
        self.basis = str(method.codec_options.get("basis", "cskv"))
        self.kinds = tuple(kind for kind in KINDS if budget.prunes(kind) or method.bits(kind))
        self.shapes, self.layers = shapes_of(bundle), sorted({head.layer for head in bundle.heads})
        self.windows = windows_of(bundle, method, recent_window, sinks)
        self.found = {at: principal(from_numpy(self._gram(*at))) for at in self._all()}
        costs = method.channel_bytes(ITEMSIZE)
        self.whole = len(self.layers) * sum(costs[kind] * math.prod(self.shapes[kind]) for kind in KINDS)
        problems: dict[Kind, list[SubsetProblem]] = {kind: [] for kind in self.kinds}
        for (layer, kind), (saved, _) in self.found.items():
            share = (saved.clamp(min=0) / saved.clamp(min=0).sum()).numpy()
            problems[kind].append(SubsetProblem(np.diag(share), 0, name=str(HeadName(layer, 0, kind))))
        self.allotment = Allotment(problems, method.sharing, queries=1, costs=costs, whole=self.whole)

    def _all(self) -> list[tuple[int, Kind]]:
        return [(layer, kind) for kind in self.kinds for layer in self.layers]

    def _gram(self, layer: int, kind: Kind) -> FloatArray:
        held = self.bundle.joint.get((layer, kind), {})
        if self.basis not in held:
            cure = (
                "calibrate with --lowrank"
                if not held
                else f"this model's {kind}s are not a plain linear layer of its input; use cskv"
            )
            raise InputError(
                f"the bundle has no matrices of {kind}s in layer {layer} for the basis {self.basis}; {cure}"
            )
        gram, size = held[self.basis], math.prod(self.shapes[kind])
        if len(gram) != size:
            raise InputError(
                f"the bundle's joint matrix of {kind}s in layer {layer} is of {len(gram)} channels, and the model has "
                f"{size} in all heads; calibrate again"
            )
        return gram

    def plans(self, budget: Budget) -> dict[int, LayerPlan]:
        """Raises InputError as `Allotment.of`."""
        from grace_opt.compression.codec import Codec
        from grace_opt.compression.cskv import Cskv
        from grace_opt.compression.integers import as_integers
        from grace_opt.compression.plan import LayerPlan

        codecs: dict[int, dict[Kind, list[Codec]]] = {layer: {} for layer in self.layers}
        pruned = {kind: iter(each) for kind, each in self.allotment.of(budget).items()}
        for layer, kind in self._all():
            heads, vectors = self.shapes[kind][0], self.found[layer, kind][1]
            codec = Cskv.of_basis(vectors[: len(vectors) - next(pruned[kind])], heads, self._bias(layer, kind))
            codecs[layer][kind] = [as_integers(codec, self.method.bits(kind) or 0, kind)]
        selection = self.method.selection
        return {
            layer: LayerPlan(layer, kinds, self.windows, None, selection.observation_window, selection.spans)
            for layer, kinds in codecs.items()
        }

    def _bias(self, layer: int, kind: Kind) -> Any:
        from torch import from_numpy

        held = self.bundle.joint[layer, kind]
        return from_numpy(held["bias"]) if self.basis == "asvd" and "bias" in held else None

    def mask(self, budget: Budget) -> KVMask:
        from grace_opt.compression.mask import KVMask
        from grace_opt.compression.plan import CachePlan

        plans = self.plans(budget)
        lost = []
        for (layer, kind), (saved, _) in self.found.items():
            rank, safe = plans[layer].codecs[kind][0].width, int((saved > _NOTHING * saved.mean()).sum())
            if self.basis != "asvd" and rank > (safe := min(safe, self._tokens())) and rank < len(saved):
                raise InputError(
                    f"the {kind}s of layer {layer} are to have a rank of {rank}, and the text has shown {safe} "
                    f"independent tokens; calibrate on more tokens, or prune more: {safe} is the largest safe rank"
                )
            lost.append(float(saved[rank:].clamp(min=0).sum() / saved.clamp(min=0).sum()))
        return KVMask(
            plan=CachePlan(plans),
            solver={
                "name": "closed form",
                "method": self.method.options(),
                "lost": sum(lost) / len(lost),  # of the squared sizes, on average over layers and kinds
            },
            **about_model(self.bundle),
        )

    def _tokens(self) -> int:
        """Prunable tokens that were seen."""
        skipped = self.bundle.integer("sinks", 0) + self.bundle.integer("recent_window", 0)
        return self.bundle.integer("windows", 1) * max(0, self.bundle.integer("window", 0) - skipped)
