"""Channel pruning as quadratic subset selection on a weighted graph (GRACE, arXiv 2604.16983, section III)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from grace_opt.errors import InputError

if TYPE_CHECKING:
    import networkx

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

SYMMETRY_TOLERANCE = 1e-9
LARGEST = 1e140  #: of an entry: solvers add up the squares of all


@dataclass(frozen=True)
class Contraction:
    """A problem with each tied group drawn together into one node.

    ``weights`` float64[k, k], ``sizes`` int64[k] (channels in a node), ``free`` bool[k] (not protected),
    ``node_of`` int64[n] (the node of each channel). A choice y of nodes costs y'Wy and prunes sizes.y channels.
    """

    weights: FloatArray
    sizes: IntArray
    free: BoolArray
    node_of: IntArray

    def __post_init__(self) -> None:
        for array in (self.weights, self.sizes, self.free, self.node_of):
            array.setflags(write=False)

    def expand(self, chosen: BoolArray) -> BoolArray:
        """The channels (bool[n]) of the chosen nodes (bool[k])."""
        expanded: BoolArray = chosen[self.node_of]
        return expanded

    def equal_size(self) -> int | None:
        """The one size that all free nodes have: then the problem is plain cardinality selection. None otherwise."""
        sizes = np.unique(self.sizes[self.free])
        if len(sizes) > 1:
            return None
        return int(sizes[0]) if len(sizes) else 1


@dataclass(frozen=True, eq=False)
class SubsetProblem:
    """minimise x'Wx subject to sum x = prune, x_i = 0 if protected, x constant on groups, x in {0,1}^n.

    x marks the channels that are **pruned**; x'Wx is the squared error of the attention logits when W is the
    graph of GRACE, W = (sum_g Q_g'Q_g) o (K'K). W is normally positive semidefinite with entries of both signs,
    but only symmetry is required.

    Args:
        weights: float64[n, n], finite, none above 1e140, symmetric to 1e-9 relative to its largest entry (then made
            exactly so).
        prune: how many channels to prune, 0 <= prune <= number of channels that may be pruned.
        protected: bool[n], channels that must be kept.
        groups: int[n]; channels with the same non-negative label are pruned together or not at all, a negative
            label leaves a channel on its own. A group with a protected channel is protected as a whole.
        name: names the problem in messages and records, e.g. ``layers.3.kv_heads.1.key``.
        metadata: anything JSON-like that belongs to the problem; not part of the digest.

    Raises:
        InputError: for NaN, a wrong shape, asymmetry, or a ``prune`` that cannot be reached.
    """

    weights: FloatArray
    prune: int
    protected: BoolArray | None = None
    groups: IntArray | None = None
    name: str = "problem"
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        weights = _checked_weights(self.weights, self.name)
        n = len(weights)
        object.__setattr__(self, "weights", weights)
        if not _is_whole(self.prune):
            raise InputError(f"{self.name}: prune must be a whole number of channels, not {self.prune!r}")
        object.__setattr__(self, "prune", int(self.prune))
        if self.protected is not None:
            object.__setattr__(self, "protected", _checked_protected(self.protected, n, self.name))
        if self.groups is not None:
            object.__setattr__(self, "groups", _checked_groups(self.groups, n, self.name))
        if not 0 <= self.prune <= self.prunable:
            raise InputError(
                f"{self.name}: cannot prune {self.prune} of {n} channels, {self.prunable} are prunable; "
                "lower the ratio or protect fewer channels"
            )
        self._check_reachable()

    @property
    def n(self) -> int:
        """Number of channels."""
        return len(self.weights)

    @cached_property
    def prunable(self) -> int:
        """How many channels may be pruned at most."""
        if self.protected is None:
            return self.n
        if self.groups is None:
            return self.n - int(np.count_nonzero(self.protected))
        contraction = self.contraction
        return int(contraction.sizes[contraction.free].sum())

    @cached_property
    def contraction(self) -> Contraction:
        """The problem over tied groups as single nodes. O(n^2); without groups W itself, not a copy."""
        free = np.ones(self.n, bool) if self.protected is None else ~self.protected
        if self.groups is None:
            return Contraction(self.weights, np.ones(self.n, np.int64), free, np.arange(self.n))
        labels = np.unique(self.groups, return_inverse=True)[1]  # below n, whatever the labels are
        alone = self.groups < 0
        labels[alone] = self.n + np.arange(np.count_nonzero(alone))
        # Nodes are numbered by their first channel, so that ties are broken as without groups.
        _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
        rank = np.empty(len(first), np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        node_of = rank[inverse]
        member = np.zeros((self.n, len(first)))
        member[np.arange(self.n), node_of] = 1.0
        node_free = np.ones(len(first), bool)
        node_free[node_of[~free]] = False
        return Contraction(member.T @ self.weights @ member, member.sum(0).astype(np.int64), node_free, node_of)

    def objective(self, pruned: ArrayLike) -> float:
        """x'Wx for a 0/1 vector of length n or a sorted list of indices. O(m^2)."""
        chosen = self.indices(pruned)
        return float(self.weights[np.ix_(chosen, chosen)].sum())

    def is_feasible(self, pruned: ArrayLike) -> bool:
        """Whether the right number is pruned, no protected channel is, and no tied group is split."""
        try:
            chosen = self.indices(pruned)
        except InputError:
            return False
        x = np.zeros(self.n, bool)
        x[chosen] = True
        if len(chosen) != self.prune or (self.protected is not None and bool((x & self.protected).any())):
            return False
        if self.groups is None:
            return True
        node_of = self.contraction.node_of
        per_node = np.bincount(node_of, weights=x)
        return bool(((per_node == 0) | (per_node == self.contraction.sizes)).all())

    def indices(self, pruned: ArrayLike) -> IntArray:
        """Sorted indices from a 0/1 vector of length n, or from a list of indices. Raises InputError.

        n numbers that are all 0 or 1 are read as a vector.
        """
        given = np.asarray(pruned)
        if given.dtype == bool and given.shape != (self.n,):
            raise InputError(f"{self.name}: a selection of length {given.size} does not fit {self.n} channels")
        if given.shape == (self.n,) and bool(((given == 0) | (given == 1)).all()):
            return np.flatnonzero(given)
        chosen = np.unique(given.astype(np.int64))
        in_range = not len(chosen) or 0 <= chosen[0] <= chosen[-1] < self.n
        if len(chosen) != given.size or not in_range or not np.isin(given, chosen).all():
            raise InputError(f"{self.name}: pruned indices must be distinct and in 0..{self.n - 1}")
        return chosen

    def digest(self) -> str:
        """sha256 (hex) of weights, prune, protected and groups: equal problems, whatever they are called."""
        digest = hashlib.sha256(f"grace_opt.problem 1 {self.n} {self.prune}".encode())
        digest.update(self.weights.tobytes())
        if self.protected is not None and self.protected.any():
            digest.update(b"protected" + np.packbits(self.protected).tobytes())
        if self.groups is not None:
            digest.update(b"groups" + self.contraction.node_of.tobytes())
        return digest.hexdigest()

    def to_networkx(self) -> networkx.Graph[int]:
        """The graph of GRACE: node weight W_ii, edge weight 2 W_ij; x'Wx is the weight of the subgraph of x."""
        import networkx

        graph: networkx.Graph[int] = networkx.Graph(name=self.name)
        for i in range(self.n):
            protected = self.protected is not None and bool(self.protected[i])
            graph.add_node(i, weight=float(self.weights[i, i]), protected=protected)
        for i in range(self.n):
            for j in range(i + 1, self.n):
                graph.add_edge(i, j, weight=2 * float(self.weights[i, j]))
        return graph

    def _check_reachable(self) -> None:
        if self.groups is None:
            return
        reachable = 1  # bit s is set when some choice of whole groups has s channels
        for size in self.contraction.sizes[self.contraction.free]:
            reachable |= reachable << int(size)
        if not reachable >> self.prune & 1:
            near = [s for s in range(self.prunable + 1) if reachable >> s & 1]
            nearest = min(near, key=lambda s: (abs(s - self.prune), s))
            raise InputError(
                f"{self.name}: no choice of whole groups prunes exactly {self.prune} channels; "
                f"the nearest count is {nearest}"
            )


def _checked_weights(weights: ArrayLike, name: str) -> FloatArray:
    try:
        given = np.asarray(weights)
        if given.dtype.kind not in "iufO":  # complex numbers would lose a part, and texts be parsed
            raise TypeError(f"they are {given.dtype}")
        array = np.array(given, dtype=np.float64, order="C")  # a copy: the caller's may change
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InputError(f"{name}: weights must be numbers in a square matrix ({error})") from None
    if array.ndim != 2 or array.shape[0] != array.shape[1] or array.size == 0:
        raise InputError(f"{name}: weights must be a square matrix, not of shape {array.shape}")
    largest = float(np.abs(array).max())  # NaN and infinity both show in the largest entry
    if not np.isfinite(largest):
        bad = int(np.count_nonzero(~np.isfinite(array)))
        raise InputError(f"{name}: weights hold {bad} NaN or infinite entries; make the graph again")
    if largest > LARGEST:
        raise InputError(
            f"{name}: weights reach {largest:.3g}, whose sums and squares overflow; divide them by their largest "
            "entry, which changes no selection"
        )
    if not np.array_equal(array, array.T):
        asymmetry = float(np.abs(array - array.T).max())
        if asymmetry > SYMMETRY_TOLERANCE * largest:
            raise InputError(
                f"{name}: weights are not symmetric (they differ by {asymmetry:.3g} where the largest entry is "
                f"{largest:.3g}); use (W + W') / 2 if that is what you mean"
            )
        array = (array + array.T) / 2
    array.flags.writeable = False
    return array


def _checked_protected(protected: ArrayLike, n: int, name: str) -> BoolArray:
    array = np.asarray(protected)
    if array.shape != (n,) or not (array.dtype == bool or np.isin(array, (0, 1)).all()):
        raise InputError(f"{name}: protected must be {n} true/false values, not {array.dtype} of shape {array.shape}")
    return array.astype(bool)


def _checked_groups(groups: ArrayLike, n: int, name: str) -> IntArray:
    array = np.asarray(groups)
    if array.shape != (n,) or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{name}: groups must be {n} whole numbers, not {array.dtype} of shape {array.shape}")
    if array.max(initial=0) > np.iinfo(np.int64).max:
        raise InputError(f"{name}: groups have labels beyond 63 bits; number them from 0 on")
    return array.astype(np.int64)


def _is_whole(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and int(value) == value
    except (TypeError, ValueError, OverflowError):  # a text; NaN; infinity
        return False


def prune_count(ratio: float, n: int, *, up: bool = False, align: int = 1) -> int:
    """How many of n channels a ratio in [0, 1) prunes: ratio * n rounded down, or ``up``, so that a multiple of
    ``align`` is kept, one at least. Raises InputError if n is not a multiple of ``align``.
    """
    if n % align:
        raise InputError(f"heads of {n} channels cannot keep multiples of {align}; change align")
    kept = (n - ratio * n) / align
    units = math.floor(kept + 1e-9) if up else math.ceil(kept - 1e-9)  # 10 - 0.7 * 10 is 3.0000000000000009
    return n - align * max(1, units)
