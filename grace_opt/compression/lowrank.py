"""Low rank: the first coordinates of a token in a basis of its head's space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from grace_opt.compression.codec import Codec
from grace_opt.compression.readout import Moments, moments
from grace_opt.errors import InputError, did_you_mean
from grace_opt.heads import Kind
from grace_opt.problem import FloatArray

if TYPE_CHECKING:
    from grace_opt.graphs.observed import Observed

BASES = ("svd", "kq-svd")


@dataclass(frozen=True, eq=False)
class LowRank(Codec):
    """A token x keeps the first coordinates of y = T x; the others are read as their mean.

    A query asks in the dual basis, T^-1' q, so scores are made in the space of the codes and no token is rebuilt. It is
    `Channels` after a change of basis: a whole token holds the rest of its coordinates, less their mean.

    Attributes:
        basis: T, [.., n, n]. ``inverse``: T^-1, or None if T is orthogonal: it is held once then.
        constant: [.., n - d], the mean of the coordinates that are not kept.
    """

    basis: Tensor
    constant: Tensor
    inverse: Tensor | None = None

    name: ClassVar[str] = "lowrank"

    def __post_init__(self) -> None:
        n, kept = self.basis.shape[-1:], self.constant.shape[-1:]
        shapes = self.basis.shape[-2:] == (*n, *n) and kept <= n and len(kept) == 1
        if not shapes or (self.inverse is not None and self.inverse.shape[-2:] != (*n, *n)):
            raise InputError(
                "a basis must be a square matrix, as its inverse, and have no fewer rows than its constant"
            )

    @classmethod
    def fit(cls, seen: Observed, kind: Kind, widths: Sequence[int], *, basis: str = "svd", **_: Any) -> list[Self]:
        """The best projections of these widths for the prunable tokens, about their mean (Eckart and Young, 1936).

        ``basis``: ``svd`` for the least squared error of the tokens; ``kq-svd`` for that of what is seen of it, by the
        observed queries or through the output projection (KQ-SVD, arXiv 2512.05916). O(n^3) a head, once for all
        widths.
        """
        if basis not in BASES:
            raise InputError(f"unknown basis {basis!r}{did_you_mean(basis, BASES)}")
        found = seen.once((cls, kind, basis), lambda: cls._of_heads(seen, kind, basis))
        return [each.of_width(width) for each, width in zip(found, widths, strict=True)]

    @classmethod
    def _of_heads(cls, seen: Observed, kind: Kind, basis: str) -> list[Self]:
        tokens = (seen.keys if kind == "key" else seen.values)[:, seen.counted]
        about = moments(tokens, None, 0.0)
        if not all(np.isfinite(each.covariance).all() for each in about):
            raise InputError(f"{kind}s to find a basis for are not finite; look at the model's weights and its dtype")
        metrics = [_metric(seen, kind, head) if basis == "kq-svd" else None for head in range(len(tokens))]
        return [
            cls.of_moments(each, metric).mapped(lambda tensor: tensor.to(tokens.device))
            for each, metric in zip(about, metrics, strict=True)
        ]

    @classmethod
    def of_moments(cls, about: Moments, metric: FloatArray | None = None) -> Self:
        """The basis whose first coordinates are the best projection of every width, here of none.

        For tokens with these moments: the least expected error e'Me, M = metric or identity.
        """
        n = len(about.mean)
        root = np.eye(n)
        if metric is not None:
            root = np.linalg.cholesky(metric + (1e-6 * np.trace(metric) / n or 1.0) * np.eye(n))
        _, vectors = np.linalg.eigh(root.T @ about.covariance @ root)
        turned = np.ascontiguousarray(vectors[:, ::-1].T)  # the largest variance first
        inverse = None if metric is None else torch.from_numpy(np.linalg.solve(root.T, turned.T)).float()
        constant = torch.from_numpy(turned @ root.T @ about.mean).float()
        return cls(torch.from_numpy(turned @ root.T).float(), constant, inverse)

    def of_width(self, width: int) -> Self:
        """With so many coordinates kept, of those that are not."""
        return replace(self, constant=self.constant[..., width - self.width :])

    @property
    def n(self) -> int:
        return self.basis.shape[-1]

    @property
    def width(self) -> int:
        return self.n - self.constant.shape[-1]

    @property
    def residual_width(self) -> int:
        return self.constant.shape[-1]

    @property
    def _inverse(self) -> Tensor:
        return self.basis.mT if self.inverse is None else self.inverse

    def encode(self, x: Tensor) -> Tensor:
        return x @ self.basis[..., : self.width, :].mT

    def residual(self, x: Tensor, z: Tensor) -> Tensor:
        return x @ self.basis[..., self.width :, :].mT - self.constant[..., None, :]

    def asked(self, query: Tensor) -> tuple[Tensor, Tensor]:
        turned = query @ self._inverse
        return turned[..., : self.width], turned[..., self.width :]

    def read(self, total: Tensor, residual: Tensor | None) -> Tensor:
        rest = self.constant[..., None, :]
        rest = rest.expand(*total.shape[:-1], -1) if residual is None else rest + residual
        return torch.cat([total, rest], dim=-1) @ self._inverse.mT


def _metric(seen: Observed, kind: Kind, head: int) -> FloatArray:
    """What is seen of an error in a token: by the observed queries, or through the output projection."""
    if kind == "key":
        rows = seen.grouped[head].double().cpu()
        metric = rows.mT @ rows
    elif seen.output_grams is None:
        raise InputError("the output projection of this model's attention was not found; use svd for values")
    else:
        heads, n = seen.values.shape[0], seen.values.shape[-1]
        metric = seen.output_grams.view(heads, -1, n, n)[head].sum(0).cpu()
    found: FloatArray = metric.numpy()
    return found
