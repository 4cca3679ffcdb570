"""Budgets: how many channels each head prunes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from grace_opt.errors import InputError
from grace_opt.greedy import forward
from grace_opt.heads import KINDS, HeadName, Kind
from grace_opt.problem import FloatArray, SubsetProblem, prune_count


class ShareError(InputError):
    """No budget of a method is within the share on a prompt; on a longer one it may be."""


@dataclass(frozen=True)
class Budget:
    """How much of the cache may go: a fraction of the key and of the value channels of old tokens, bytes, or a share.

    Attributes:
        ratio, value_ratio: fraction of the key (value) channels to prune, of each head or of the average head.
        bytes_per_token: in place of the ratios: what an old token may take in all compressed layers together, in keys
            and values (with its share of the integers' scales; whole tokens and read-outs come on top).
        share: in place of the others: what the compressed layers may hold after a prompt, windows, scales, positions
            and read-outs counted, as a share of what they hold uncompressed.
        tokens: of that prompt, where there is none.
        kinds: what may be pruned, in bytes or a share.
    """

    ratio: float = 0.0
    value_ratio: float = 0.0
    bytes_per_token: float | None = None
    share: float | None = None
    tokens: int = 8192
    kinds: tuple[Kind, ...] = KINDS

    def __post_init__(self) -> None:
        for name, each in (("ratio", self.ratio), ("value ratio", self.value_ratio)):
            if not 0 <= each < 1:  # also refuses NaN
                raise InputError(f"the {name} must be at least 0 and below 1, got {each}")
        if self.bytes_per_token is not None and not 0 < self.bytes_per_token < math.inf:
            raise InputError(f"the budget in bytes must be positive, got {self.bytes_per_token}")
        if self.share is not None and not 0 < self.share <= 1:
            raise InputError(f"the share of the bytes must be above 0 and at most 1, got {self.share}")
        if not 0 < self.tokens < 2**31:
            raise InputError(f"a prompt must have from 1 to {2**31 - 1} tokens to take a share of, got {self.tokens}")

    def of(self, kind: Kind) -> float:
        """The ratio for keys or for values."""
        return self.ratio if kind == "key" else self.value_ratio

    def prunes(self, kind: Kind) -> bool:
        """Whether keys (or values) may be pruned."""
        in_bytes = self.bytes_per_token is not None or self.share is not None
        return kind in self.kinds if in_bytes else self.of(kind) > 0

    def require_no_share(self, what: str) -> None:
        """Raise InputError if this is a share: ``what`` is made before there is a prompt to take a share of."""
        if self.share is not None:
            raise InputError(f"a share counts what a prompt's cache holds, and {what} is made without one; give ratios")


@dataclass(frozen=True)
class Sharing:
    """How a budget is shared over heads.

    Attributes:
        budget: ``uniform``: every head prunes the same; ``shared``: the heads of all layers share a total.
        rounding: of ratio * n in the uniform budget (GRACE prunes the ceiling, ThinK the floor).
        align: each head keeps a multiple of so many channels, or of the size of tied groups if that is more.
        floor: of the shared budget: each head keeps at least so many channels.
        value_weight: where keys and values share bytes, how much an error of the values counts.
        token_weight: where tokens and channels do, how much the attention on dropped tokens counts.
    """

    budget: Literal["uniform", "shared"] = "shared"
    rounding: Literal["floor", "ceil"] = "floor"
    floor: int = 4
    align: int = 1
    value_weight: float = 5.0
    token_weight: float = 5.0

    def __post_init__(self) -> None:
        weights = (self.value_weight, self.token_weight)
        if self.align < 1 or self.floor < 0 or not all(0 <= each < math.inf for each in weights):
            raise InputError(
                "align must be at least 1, floor, value_weight and token_weight not negative; got "
                f"{self.align}, {self.floor}, {self.value_weight} and {self.token_weight}"
            )


class Allotment:
    """How many channels each head prunes, under any budget; what no budget changes is computed once.

    Args:
        problems: kind -> all heads of all layers, in order, named as in a graph bundle, with nothing to prune yet.
        queries: how many queries W counts for.
        costs: bytes of one channel of a token; ``whole``: of a token with nothing pruned. For budgets in bytes.
    """

    def __init__(
        self,
        problems: Mapping[Kind, Sequence[SubsetProblem]],
        sharing: Sharing,
        *,
        queries: int,
        costs: Mapping[Kind, float],
        whole: float,
    ) -> None:
        self.problems, self._sharing, self._queries = problems, sharing, queries
        self._costs, self._whole = costs, whole
        self._units = {kind: math.lcm(sharing.align, _tied(heads)) for kind, heads in problems.items()}

    def of(self, budget: Budget) -> dict[Kind, list[int]]:
        """Kind -> what each of its problems prunes.

        Raises InputError for a budget that floors or protection do not allow, or a share.
        """
        budget.require_no_share("an allotment")
        if self._sharing.budget == "shared":
            return self._shared(budget)
        return self._uniform_ratios(budget) if budget.bytes_per_token is None else self._uniform(budget.bytes_per_token)

    def error(self, budget: Budget) -> float:
        """What a budget costs, in the measure that keys and values share bytes by: the mean over heads."""
        prunes, weights = self.of(budget), {"key": 1.0, "value": self._sharing.value_weight}
        errors = {
            kind: sum(float(curve[m]) for curve, m in zip(self._curves[kind], each, strict=True)) / len(each)
            for kind, each in prunes.items()
        }
        return sum(weights[kind] * error for kind, error in errors.items())

    def _uniform_ratios(self, budget: Budget) -> dict[Kind, list[int]]:
        up = self._sharing.rounding == "ceil"  # a head with less to prune is refused when its problem is made
        return {
            kind: [prune_count(budget.of(kind), p.n, up=up, align=self._units[kind]) for p in heads]
            for kind, heads in self.problems.items()
        }

    def _uniform(self, asked: float) -> dict[Kind, list[int]]:
        prunable = sum(self._costs[kind] * sum(p.n for p in heads) for kind, heads in self.problems.items())
        ratio = max(0.0, (self._whole - asked) / prunable)
        prunes = {
            kind: [prune_count(ratio, p.n, up=True, align=self._units[kind]) for p in heads]
            for kind, heads in self.problems.items()
        }
        too_much = (
            m > p.prunable or p.n - m > (1 - ratio) * p.n + 1e-9
            for kind, heads in self.problems.items()
            for m, p in zip(prunes[kind], heads, strict=True)
        )
        if any(too_much):
            most = min(min(p.prunable, p.n - 1) / p.n for heads in self.problems.values() for p in heads)
            least = self._whole - most * (self._whole - asked) / ratio
            raise InputError(
                f"an old token takes at least {math.ceil(least)} of {self._whole:g} bytes if every head prunes the "
                f"same, and {asked:g} is asked for; raise the budget, prune values too or protect fewer channels"
            )
        return prunes

    def _shared(self, budget: Budget) -> dict[Kind, list[int]]:
        if budget.bytes_per_token is None:
            totals = {kind: sum(p.n for p in heads) * budget.of(kind) for kind, heads in self.problems.items()}
            return {kind: self._of_kind[kind].at_least(math.floor(total + 1e-9)) for kind, total in totals.items()}
        pruned = iter(self._in_bytes.at_least(self._whole - budget.bytes_per_token))
        return {kind: [next(pruned) for _ in heads] for kind, heads in self.problems.items()}

    @cached_property
    def _curves(self) -> dict[Kind, list[FloatArray]]:
        for kind, heads in self.problems.items():
            if heads[0].n % self._units[kind]:
                raise InputError(
                    f"heads of {heads[0].n} channels cannot keep multiples of {self._units[kind]}; change align"
                )
        return {kind: _comparable(heads, kind, self._queries) for kind, heads in self.problems.items()}

    @cached_property
    def _of_kind(self) -> dict[Kind, Savings]:
        """What keys, and values, save in channels."""
        return {
            kind: Savings(
                self._curves[kind], floor=self._sharing.floor, align=self._units[kind], sizes=[p.n for p in heads]
            )
            for kind, heads in self.problems.items()
        }

    @cached_property
    def _in_bytes(self) -> Savings:
        """What both save in bytes."""
        weights = {"key": 1.0, "value": self._sharing.value_weight}
        return Savings(
            [weights[kind] * curve for kind, each in self._curves.items() for curve in each],
            floor=self._sharing.floor,
            align=math.lcm(*self._units.values()),
            costs=[self._costs[kind] for kind, heads in self.problems.items() for _ in heads],
            whole=self._whole,
            sizes=[p.n for heads in self.problems.values() for p in heads],
        )


def within_share(asked: Budget, held: Callable[[Budget], float], whole: float, full: float) -> Budget:
    """The largest budget in bytes with which a prompt's cache holds at most the share that is asked for of ``full``.

    ``held``: the bytes of the cache under a budget, which grow with it; ``whole`` those of a token with nothing pruned.
    The steps of the answer are ``whole`` / 2**12. Raises ShareError, with the least share, if none is that small.
    """
    assert asked.share is not None
    most = asked.share * full

    def in_bytes(bytes_per_token: float) -> Budget:
        return replace(asked, share=None, bytes_per_token=bytes_per_token)

    high = in_bytes(whole)
    if (least := held(high)) <= most:
        return high
    low, fits = 0, None
    top = 1 << 12
    while top - low > 1:
        middle = (low + top) // 2
        tried = in_bytes(whole * middle / (1 << 12))
        try:
            bytes_held = held(tried)
        except InputError:  # below what floors or protection allow
            low = middle
            continue
        if bytes_held <= most:
            low, fits = middle, tried
        else:
            top, least = middle, min(least, bytes_held)
    if fits is None:
        raise ShareError(
            f"the method holds at least {math.ceil(1000 * least / full) / 1000:g} of the uncompressed bytes of such a "
            f"prompt, with windows, scales and read-outs, and {asked.share:g} is asked for; raise the share, lower the "
            "method's floor or windows, or give longer prompts"
        )
    return fits


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
    totals: dict[int, float] = defaultdict(float)
    layers = [HeadName.parse(problem.name).layer for problem in problems]
    for layer, problem in zip(layers, problems, strict=True):
        totals[layer] += float(problem.weights.sum())
    return [curve / (totals[layer] or 1.0) for layer, curve in zip(layers, curves, strict=True)]


class Savings:
    """What pruning saves, channel by channel of all heads, in the order of the error for it.

    ``curves[h][m]`` is the error of head h with m channels pruned, m = 0 .. the most it can prune; only the lower
    convex hull of a curve matters. Each head keeps at least ``floor`` channels and prunes a multiple of ``align``.
    ``costs`` are what pruning one channel of each head saves (1 if left out); ``sizes`` the heads' channels, where
    protected ones end a curve early; ``whole`` what there is with nothing pruned, for the message. O(heads n log).
    """

    def __init__(
        self,
        curves: Sequence[FloatArray],
        *,
        floor: int = 0,
        align: int = 1,
        costs: Sequence[float] | None = None,
        whole: float | None = None,
        sizes: Sequence[int] | None = None,
    ) -> None:
        each = np.ones(len(curves)) if costs is None else np.array(costs, dtype=float)
        sizes = [len(curve) - 1 for curve in curves] if sizes is None else sizes
        most = [
            align * max(0, min(len(curve) - 1, size - floor) // align)
            for curve, size in zip(curves, sizes, strict=True)
        ]
        self._floor, self._align, self._count = floor, align, len(curves)
        self._possible = float(each @ most)
        self._whole = float(sum(sizes)) if whole is None else whole
        slopes = [_hull_slopes(curve[: limit + 1 : align]) for curve, limit in zip(curves, most, strict=True)]
        heads = np.repeat(np.arange(len(slopes)), list(map(len, slopes)))
        # Stable, so that steps of one head stay in their order.
        order = np.lexsort((heads, np.concatenate(slopes) / each[heads]))
        self._heads = heads[order]  # whose step comes when
        self._saved = np.cumsum(align * each[self._heads])

    def at_least(self, total: float) -> list[int]:
        """How many channels each head prunes so that ``total`` is saved, and less than one step more, at little error.

        Channels are pruned, ``align`` at a time, where the marginal error for what is saved is least: exact for convex
        curves and equal costs (Fox, Operations Research 14, 1966). Raises InputError if the floors leave too little to
        prune, and says how much. O(log(heads n) + heads).
        """
        if total > self._possible * (1 + 1e-12):
            least, asked = self._whole - self._possible, self._whole - total
            raise InputError(
                f"the budget is below the floors: {self._count} heads that keep at least {self._floor} channels each, "
                f"in multiples of {self._align}, take at least {least:g} of {self._whole:g}, and {asked:g} is asked "
                "for; raise the budget or lower the floor"
            )
        steps = 0 if total <= 0 else 1 + int(np.searchsorted(self._saved, total * (1 - 1e-12)))
        pruned: list[int] = (self._align * np.bincount(self._heads[:steps], minlength=self._count)).tolist()
        return pruned


def error_curves(problems: Sequence[SubsetProblem]) -> list[FloatArray]:
    """For each head the objective with its 0, 1, ... channels of forward greedy pruned, all heads at once.

    The heads must have one n, and tied groups of one size s (then a curve is exact at multiples of s, and linear
    between them). Protected channels are never pruned: a curve ends where they begin. O(heads n^2).
    """
    size = _tied(problems)
    graphs = [problem.contraction for problem in problems]
    weights = np.stack([graph.weights for graph in graphs])
    _, costs = forward(weights, weights.shape[1], np.stack([graph.free for graph in graphs]))
    steps = np.concatenate([np.zeros((len(weights), 1)), costs], axis=1).cumsum(1)
    if size > 1:
        at = np.arange(size * (steps.shape[1] - 1) + 1) / size
        steps = np.stack([np.interp(at, np.arange(steps.shape[1]), row) for row in steps])
    return [curve[: 1 + problem.prunable] for curve, problem in zip(steps, problems, strict=True)]


def _tied(problems: Sequence[SubsetProblem]) -> int:
    """How many channels are tied together in all heads alike. Raises InputError if that differs."""
    sizes = {1 if problem.groups is None else problem.contraction.equal_size() for problem in problems}
    if len(sizes) > 1 or None in sizes:
        raise InputError("channels are tied in groups of several sizes, which no budget can be shared over; tie pairs")
    return sizes.pop() or 1


def _hull_slopes(curve: FloatArray) -> FloatArray:
    """The steps of the lower convex hull of a curve, one for each step of the curve, ascending. O(n)."""
    corners, y = [0], curve.tolist()
    for i in range(1, len(y)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (y[b] - y[a]) * (i - b) < (y[i] - y[b]) * (b - a):
                break
            corners.pop()
        corners.append(i)
    lengths = np.diff(corners)
    slopes = np.diff(curve[corners]) / lengths
    # Rounding may turn two equal ones round.
    return np.repeat(np.maximum.accumulate(slopes), lengths) if len(slopes) else slopes
