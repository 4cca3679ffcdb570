"""Gram matrices of all KV heads of a layer side by side: what joint ranks are fitted to (`compression.cskv`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from grace_opt.errors import InputError, did_you_mean
from grace_opt.graphs.bundle import BASES
from grace_opt.graphs.observed import InputProjections, Observed, double
from grace_opt.heads import KINDS, Kind
from grace_opt.problem import FloatArray

_MIXING = 0.3  # of equal weights into attention's, as measured (docs/results/lowrank.md)


def require_basis(basis: str) -> None:
    """Raise InputError for an unknown name."""
    if basis not in BASES:
        raise InputError(f"unknown basis {basis!r}{did_you_mean(basis, BASES)}")


def joint_gram(seen: Observed, kind: Kind, basis: str) -> Tensor:
    """float64[H n, H n], about zero; O(T (H n)^2). Keys are those before RoPE.

    - ``cskv``: sum x x' over the prunable tokens.
    - ``attention``: the same under the attention that each token receives, mixed with equal weights; of a sum of 1.
    - ``asvd``: W D W', W the projection and D its input's mean magnitudes: the squared right factor of ASVD (arXiv
      2312.05821, alpha 0.5), by which CSKV initialises.
    """
    if basis == "asvd":
        weight, _ = inputs_of(seen).of(kind)
        return (weight * (double(inputs_of(seen).magnitudes) + 1e-6)) @ weight.mT
    tokens = (before_rope(seen) if kind == "key" else seen.values)[:, seen.prunable]
    rows = double(tokens.movedim(0, 1).flatten(1))
    if basis == "attention":
        received = double(seen.token_weights).mean(0)
        rows = rows * ((1 - _MIXING) * received + _MIXING / len(rows)).sqrt()[:, None]
    return rows.mT @ rows


def before_rope(seen: Observed) -> Tensor:
    """The keys [H, T, n] of a prompt as they were before their positions turned them."""
    if seen.turn is None:
        raise InputError("keys before RoPE are not known here; use a codec of keys after RoPE, such as svd")

    turn = seen.turn
    return seen.once(before_rope, lambda: turn.back(seen.keys))


def inputs_of(seen: Observed) -> InputProjections:
    """What the prompt's keys and values were made of. Raises InputError if that is not known."""
    if seen.inputs is None:
        raise InputError(
            "ASVD looks at what the projections of keys and values were given, and that was not looked at here, or "
            "this model has no such projections; use cskv"
        )
    return seen.inputs


@dataclass
class JointSums:
    """The Gram matrices of many windows of text, summed up one window after the other: O(layers (H n)^2) memory.

    Those of ``cskv`` and ``attention`` are sums over tokens and windows, of ``asvd`` a sum over windows; none is known
    of a projection that has no factors.
    """

    _sums: dict[tuple[int, Kind], dict[str, Tensor]] = field(default_factory=dict)
    _biases: dict[tuple[int, Kind], Tensor | None] = field(default_factory=dict)

    def add(self, layer: int, seen: Observed) -> None:
        """Add one window of one layer."""
        for kind in KINDS:
            bases = list(BASES)
            try:
                self._biases[layer, kind] = inputs_of(seen).of(kind)[1]
            except InputError:
                bases.remove("asvd")
            sums = self._sums.setdefault((layer, kind), {})
            for basis in bases:
                term = joint_gram(seen, kind, basis)
                sums[basis] = sums[basis] + term if basis in sums else term

    def found(self) -> dict[tuple[int, Kind], dict[str, FloatArray]]:
        """As of `GraphBundle.joint`."""
        found: dict[tuple[int, Kind], dict[str, FloatArray]] = {}
        for at, sums in self._sums.items():
            bias = self._biases.get(at)
            held = {**sums, **({} if bias is None else {"bias": bias})}
            found[at] = {name: each.cpu().numpy() for name, each in held.items()}
        return found
