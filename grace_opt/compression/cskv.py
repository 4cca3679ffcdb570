"""CSKV's channel shrinking (Wang et al., 2024, arXiv 2409.10593): one low-rank row for all KV heads of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from grace_opt.compression.codec import Codec
from grace_opt.errors import InputError
from grace_opt.graphs.joint import inputs_of, joint_gram, require_basis
from grace_opt.heads import Kind

if TYPE_CHECKING:
    from grace_opt.graphs.observed import Observed


@dataclass(frozen=True, eq=False)
class Cskv(Codec):
    """The tokens x of all KV heads side by side are stored as z = A x and read as A' z + constant.

    Keys are meant before RoPE: old ones are rebuilt and turned as they are read. Values are not rebuilt: the weights
    are summed over rows, and each head reads that by its own part of A. A whole token holds the rest at full width, so
    nothing of A's complement is held.

    Attributes:
        basis: A, [.., d, H n].
        kv_heads: H.
        constant: [.., H n], or None for zeros.
    """

    basis: Tensor
    kv_heads: int
    constant: Tensor | None = None

    name: ClassVar[str] = "cskv"
    spectral: ClassVar[bool] = True
    before_rope: ClassVar[bool] = True

    def __post_init__(self) -> None:
        size = self.basis.shape[-1]
        if not 0 < self.basis.shape[-2] <= size or self.kv_heads < 1 or size % self.kv_heads:
            raise InputError(
                f"a joint rank must be from 1 to the {size} channels of all {self.kv_heads} KV heads, which are of one "
                f"size; got {self.basis.shape[-2]}"
            )
        if self.constant is not None and self.constant.shape[-1] != size:
            raise InputError("the constant of a joint rank must be as wide as its basis")

    @classmethod
    def fit(cls, seen: Observed, kind: Kind, widths: Sequence[int], *, basis: str = "cskv", **_: Any) -> list[Self]:
        """One codec for all heads, of the rank that the heads' widths sum to.

        With G = V S V' the Gram matrix of this ``basis`` (`grace_opt.graphs.joint`), its eigenvalues descending, A =
        V_d' and its B = V_d: the least squared error under G (Eckart and Young, 1936), which the paper's reconstruction
        training approaches. ASVD's code, a function of the projection's input, is the key's own projection on V_d up to
        a scale of each number, and so is taken of the key; a bias is read as it is.

        O(T (H n)^2 + (H n)^3), once for all ranks.
        """
        vectors = _principal(cls, seen, kind, basis)[1]
        rank, heads = sum(widths), len(seen.keys)
        if not 0 < rank <= len(vectors):
            raise InputError(
                f"a joint rank must be from 1 to the {len(vectors)} channels of all heads, got {rank}; prune less"
            )
        bias = inputs_of(seen).of(kind)[1] if basis == "asvd" else None
        return [cls.of_basis(vectors[:rank].to(seen.keys.device), heads, bias)]

    @classmethod
    def of_basis(cls, kept: Tensor, heads: int, bias: Tensor | None = None) -> Self:
        """Of orthonormal rows float32[d, H n]; a bias float64[H n] is read as it is, whatever the rows make of it."""
        constant: Tensor | None = None
        if bias is not None:
            constant = (bias - kept.double().mT @ (kept.double() @ bias)).float()
        return cls(kept, heads, constant=constant)

    @classmethod
    def spectrum(cls, seen: Observed, kind: Kind, *, basis: str = "cskv", **_: Any) -> Tensor:
        eigenvalues = _principal(cls, seen, kind, basis)[0].clamp(min=0)
        return eigenvalues / eigenvalues.sum()

    @classmethod
    def looks_at_inputs(cls, *, basis: str = "cskv", **_: Any) -> bool:
        return basis == "asvd"

    @property
    def n(self) -> int:
        return self.basis.shape[-1] // self.kv_heads

    @property
    def heads(self) -> int:
        return self.kv_heads

    @property
    def width(self) -> int:
        return self.basis.shape[-2]

    def _by_head(self, tensor: Tensor) -> Tensor:
        """[.., H, d, n] of [.., d, H n]; stacked codecs have a dimension of one row of heads, which these take."""
        parts: Tensor = tensor.unflatten(-1, (self.kv_heads, -1)).movedim(-2, -3)  # type: ignore[no-untyped-call]
        return parts.squeeze(-4) if parts.dim() > 3 else parts

    def encode(self, x: Tensor) -> Tensor:
        return x.movedim(-3, -2).flatten(-2).unsqueeze(-3) @ self.basis.mT

    def asked(self, query: Tensor) -> tuple[Tensor, Tensor]:
        return query @ self._by_head(self.basis).mT, query

    def read(self, total: Tensor, residual: Tensor | None) -> Tensor:
        if total.shape[-3] == 1:  # rows: all heads in one product
            side_by_side = (total @ self.basis).squeeze(-3)
            found: Tensor = side_by_side.unflatten(-1, (self.kv_heads, -1)).movedim(-2, -3)  # type: ignore[no-untyped-call]
        else:
            found = total @ self._by_head(self.basis)
        if self.constant is not None:
            found = found + self._by_head(self.constant.unsqueeze(-2))
        return found if residual is None else found + residual


def _principal(made_by: type, seen: Observed, kind: Kind, basis: str) -> tuple[Tensor, Tensor]:
    """`principal` of a basis' Gram matrix, once for all ranks."""
    require_basis(basis)
    return seen.once((made_by, kind, basis), lambda: principal(joint_gram(seen, kind, basis)))


def principal(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues float64[n], the largest first, and eigenvectors float32[n, n], a row each. Raises InputError.

    Where fewer tokens than n were seen, what they leave open is the same for equal tokens, whatever rounding says.
    """
    if not bool(torch.isfinite(gram).all()):
        raise InputError("keys or values to find a basis for are not finite; look at the model's weights and its dtype")
    n = len(gram)
    order = torch.linspace(2, 1, n, dtype=torch.float64) * (1e-9 * gram.diagonal().sum().item() / n or 1.0)
    values, vectors = torch.linalg.eigh(gram.cpu() + order.diag())
    return values.flip(0), vectors.mT.flip(0).float().contiguous()
