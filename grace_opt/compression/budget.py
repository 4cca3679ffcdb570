"""Budgets: how many channels each head prunes."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np

from grace_opt.errors import InputError
from grace_opt.graphs.bundle import GraphBundle, Kind
from grace_opt.problem import FloatArray, SubsetProblem, prune_count


@dataclass(frozen=True)
class Budget:
    """How much of the cache of old tokens may go: a fraction of the key and of the value channels, or bytes.

    Attributes:
        ratio, value_ratio: fraction of the key (value) channels to prune, of each head or of the average head.
        bytes_per_token: in place of the ratios: what an old token may take in all compressed layers together, in keys
            and values (with its share of the integers' scales; whole tokens and read-outs come on top).
    """

    ratio: float = 0.0
    value_ratio: float = 0.0
    bytes_per_token: float | None = None

    def __post_init__(self) -> None:
        for name, each in (("ratio", self.ratio), ("value ratio", self.value_ratio)):
            if not 0 <= each < 1:  # also refuses NaN
                raise InputError(f"the {name} must be at least 0 and below 1, got {each}")
        if self.bytes_per_token is not None and not 0 < self.bytes_per_token < math.inf:
            raise InputError(f"the budget in bytes must be positive, got {self.bytes_per_token}")

    def of(self, kind: Kind) -> float:
        """The ratio for keys or for values."""
        return self.ratio if kind == "key" else self.value_ratio


@dataclass(frozen=True)
class Sharing:
    """How a budget is shared over heads.

    Attributes:
        budget: ``uniform``: every head prunes the same; ``shared``: the heads of all layers share a total.
        rounding: of ratio * n in the uniform budget (GRACE prunes the ceiling, ThinK the floor).
        align: each head keeps a multiple of so many channels.
        floor: of the shared budget: each head keeps at least so many channels.
        value_weight: where keys and values share bytes, how much an error of the values counts.
    """

    budget: Literal["uniform", "shared"] = "shared"
    rounding: Literal["floor", "ceil"] = "floor"
    floor: int = 4
    align: int = 1
    value_weight: float = 5.0

    def __post_init__(self) -> None:
        if self.align < 1 or self.floor < 0 or not 0 <= self.value_weight < math.inf:
            raise InputError(
                f"align must be at least 1, floor and value_weight not negative; got {self.align}, {self.floor} and "
                f"{self.value_weight}"
            )


def allot(
    problems: Mapping[Kind, Sequence[SubsetProblem]],
    budget: Budget,
    sharing: Sharing,
    *,
    queries: int,
    costs: Mapping[Kind, float],
    whole: float,
) -> dict[Kind, list[int]]:
    """How many channels each head prunes: kind -> one number a problem.

    A kind's problems are all heads of all layers, in order, named as in a graph bundle, with nothing to prune yet.
    ``queries`` is how many queries W counts for; ``costs`` the bytes of one channel of a token, and ``whole`` those of
    a token with nothing pruned, for a budget in bytes. Raises InputError for a budget that floors or protection do not
    allow.
    """
    if sharing.budget == "uniform":
        if budget.bytes_per_token is None:
            up = sharing.rounding == "ceil"
            # A head with less to prune is refused when its problem is made.
            return {
                kind: [prune_count(budget.of(kind), p.n, up=up, align=sharing.align) for p in heads]
                for kind, heads in problems.items()
            }
        ratio = max(
            0.0,
            (whole - budget.bytes_per_token)
            / sum(costs[kind] * sum(p.n for p in heads) for kind, heads in problems.items()),
        )
        prunes = {
            kind: [prune_count(ratio, p.n, up=True, align=sharing.align) for p in heads]
            for kind, heads in problems.items()
        }
        too_much = (
            m > p.prunable or p.n - m > (1 - ratio) * p.n + 1e-9
            for kind, heads in problems.items()
            for m, p in zip(prunes[kind], heads, strict=True)
        )
        if any(too_much):
            most = min(min(p.prunable, p.n - 1) / p.n for heads in problems.values() for p in heads)
            least = whole - most * (whole - budget.bytes_per_token) / ratio
            raise InputError(
                f"an old token takes at least {math.ceil(least)} of {whole:g} bytes if every head prunes the same, and "
                f"{budget.bytes_per_token:g} is asked for; raise the budget, prune values too or protect fewer channels"
            )
        return prunes
    for heads in problems.values():
        if heads[0].n % sharing.align:
            raise InputError(f"heads of {heads[0].n} channels cannot keep multiples of {sharing.align}; change align")
    curves = {kind: _comparable(heads, kind, queries) for kind, heads in problems.items()}
    share = partial(shared, floor=sharing.floor, align=sharing.align)
    if budget.bytes_per_token is None:
        totals = {kind: sum(p.n for p in heads) * budget.of(kind) for kind, heads in problems.items()}
        return {
            kind: share(curves[kind], math.floor(total + 1e-9), sizes=[p.n for p in problems[kind]])
            for kind, total in totals.items()
        }
    flat = [(kind, curve) for kind, each in curves.items() for curve in each]
    pruned = share(
        [sharing.value_weight * curve if kind == "value" else curve for kind, curve in flat],
        whole - budget.bytes_per_token,
        costs=[costs[kind] for kind, _ in flat],
        whole=whole,
        sizes=[problem.n for heads in problems.values() for problem in heads],
    )
    return {kind: [m for (of, _), m in zip(flat, pruned, strict=True) if of == kind] for kind in problems}


def problems_of(bundle: GraphBundle, budget: Budget, sharing: Sharing, *, protect: bool = True) -> list[SubsetProblem]:
    """A problem for each head of a bundle, in its order, that prunes what a budget allots to it.

    A budget in bytes is of a cache of 16-bit numbers. Raises InputError as `allot` does, if a ratio prunes more than is
    prunable, and for tied channels in any but a uniform ratio.
    """
    if sharing.budget == "uniform" and budget.bytes_per_token is None:
        return bundle.problems(budget.ratio, value_ratio=budget.value_ratio, protect=protect, align=sharing.align)
    plain = bundle.problems(0.0, protect=protect)
    if any(problem.groups is not None for problem in plain):
        raise InputError("this bundle ties channels in groups, for which only a uniform ratio is supported yet")
    problems: dict[Kind, list[SubsetProblem]] = {}
    for head, problem in zip(bundle.heads, plain, strict=True):
        problems.setdefault(head.kind, []).append(problem)
    kv_heads = bundle.integer("num_key_value_heads", 1 + max(head.kv_head for head in bundle.heads))
    group = bundle.integer("num_attention_heads", kv_heads) // kv_heads
    dims = {"key": bundle.integer("head_dim", plain[0].n)}
    dims["value"] = bundle.integer("value_head_dim", dims["key"])
    layers = len({head.layer for head in bundle.heads})
    prunes = allot(
        problems,
        budget,
        sharing,
        queries=group * bundle.integer("observation_window", 32),
        costs={"key": 2.0, "value": 2.0},
        whole=2.0 * layers * kv_heads * sum(dims.values()),
    )
    left = {kind: iter(each) for kind, each in prunes.items()}
    return [replace(problem, prune=next(left[head.kind])) for head, problem in zip(bundle.heads, plain, strict=True)]


def bytes_per_channel(bits: int | None, element_size: int) -> float:
    """Bytes of one channel of an old token; of integers, with its share of the 16-bit scales and zeros of 32.

    A little less than what is held where tokens (keys) or a head's kept channels (values) are no multiple of 32.
    """
    return element_size if bits is None else (bits + 1) / 8


def _comparable(problems: Sequence[SubsetProblem], kind: Kind, queries: int) -> list[FloatArray]:
    """Error curves on one scale: keys, the mean over observed queries; values, the share of the layer's total."""
    curves = error_curves(problems)
    if kind == "key":
        return [curve / queries for curve in curves]
    # Outputs of different layers are of different size, and add to the same residual stream.
    totals: dict[str, float] = defaultdict(float)
    layers = [problem.name.split(".kv_heads.")[0] for problem in problems]
    for layer, problem in zip(layers, problems, strict=True):
        totals[layer] += float(problem.weights.sum())
    return [curve / (totals[layer] or 1.0) for layer, curve in zip(layers, curves, strict=True)]


def shared(
    curves: Sequence[FloatArray],
    total: float,
    *,
    floor: int = 0,
    align: int = 1,
    costs: Sequence[float] | None = None,
    whole: float | None = None,
    sizes: Sequence[int] | None = None,
) -> list[int]:
    """How many channels each head prunes so that ``total`` are saved in all, at little error.

    ``curves[h][m]`` is the error of head h with m channels pruned, m = 0 .. the most it can prune; only the lower
    convex hull of a curve matters. Each head keeps at least ``floor`` channels and prunes a multiple of ``align``.
    ``costs`` are what pruning one channel of each head saves (1 if left out), in the unit of ``total``; ``sizes`` the
    heads' channels, where protected ones end a curve early; ``whole`` what there is with nothing pruned, for the
    message.

    Channels are pruned, ``align`` at a time, where the marginal error for what is saved is least: exact for convex
    curves and equal costs (Fox, Operations Research 14, 1966). At least ``total`` is saved, and less than one step
    more. O(heads n log heads). Raises InputError if the floors leave too little to prune, and says how much.
    """
    each = [1.0] * len(curves) if costs is None else list(costs)
    sizes = [len(curve) - 1 for curve in curves] if sizes is None else sizes
    most = [
        align * max(0, min(len(curve) - 1, size - floor) // align) for curve, size in zip(curves, sizes, strict=True)
    ]
    possible = sum(cost * limit for cost, limit in zip(each, most, strict=True))
    if total > possible * (1 + 1e-12):
        if whole is None:
            whole = float(sum(sizes))
        raise InputError(
            f"the budget is below the floors: {len(curves)} heads that keep at least {floor} channels each, in "
            f"multiples of {align}, take at least {whole - possible:g} of {whole:g}, and {whole - total:g} is asked "
            "for; raise the budget or lower the floor"
        )
    pruned = [0] * len(curves)
    slopes = [_hull_slopes(curve[: limit + 1 : align]) for curve, limit in zip(curves, most, strict=True)]
    heap = [(float(slope[0]) / each[head], head) for head, slope in enumerate(slopes) if len(slope)]
    heapq.heapify(heap)
    saved = 0.0
    while saved < total * (1 - 1e-12) and heap:
        _, head = heapq.heappop(heap)
        pruned[head] += align
        saved += align * each[head]
        step = pruned[head] // align
        if step < len(slopes[head]):
            heapq.heappush(heap, (float(slopes[head][step]) / each[head], head))
    return pruned


def error_curves(problems: Sequence[SubsetProblem]) -> list[FloatArray]:
    """For each head the objective with its 0, 1, ... channels of forward greedy pruned, all heads at once.

    The heads must have one n and no tied groups. Protected channels are never pruned: a curve ends where they begin.
    O(heads n^2).
    """
    weights = np.stack([problem.weights for problem in problems])
    heads, n = weights.shape[:2]
    scores = np.diagonal(weights, axis1=1, axis2=2).copy()
    for row, problem in zip(scores, problems, strict=True):
        if problem.protected is not None:
            row[problem.protected] = np.inf
    rows, steps = np.arange(heads), np.zeros((heads, n + 1))
    for step in range(1, n + 1):
        picks = scores.argmin(1)
        steps[:, step] = scores[rows, picks]
        scores += 2 * weights[rows, picks]
        scores[rows, picks] = np.inf
    return [curve[: 1 + problem.prunable] for curve, problem in zip(steps.cumsum(1), problems, strict=True)]


def _hull_slopes(curve: FloatArray) -> FloatArray:
    """The steps of the lower convex hull of a curve, one for each step of the curve, ascending. O(n)."""
    corners = [0]
    for i in range(1, len(curve)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (curve[b] - curve[a]) * (i - b) < (curve[i] - curve[b]) * (b - a):
                break
            corners.pop()
        corners.append(i)
    steps = [np.full(b - a, (curve[b] - curve[a]) / (b - a)) for a, b in pairwise(corners)]
    return np.concatenate(steps) if steps else np.empty(0)
