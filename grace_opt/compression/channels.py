"""Kept channels, and a linear read-out of the dropped ones from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from grace_opt.compression.codec import Codec


@dataclass(frozen=True, eq=False)
class Channels(Codec):
    """A token x keeps its channels A; the dropped ones P are read as constant + B x_A, or as zeros.

    A query meets kept channels as q_A + B'q_P, and a whole token's residual x_P - B x_A - constant as q_P; q_P'constant
    is the same for all tokens and left out. An output is o_A in the kept channels, and B o_A + constant in the others.

    Attributes:
        order: int64[.., n], the kept channels, then the others, each ascending.
        kept: how many are kept, d.
        matrix: B, [.., n - d, d], or None for zeros.
        constant: [.., n - d], or None for zeros.
    """

    order: Tensor
    kept: int
    matrix: Tensor | None = None
    constant: Tensor | None = None

    name: ClassVar[str] = "channels"
    selects: ClassVar[bool] = True

    @classmethod
    def keeping(
        cls, keep: ArrayLike, n: int, matrix: ArrayLike | None = None, constant: ArrayLike | None = None
    ) -> Self:
        """One head that keeps channels int[d] (sorted) of n, with a read-out in float32 if one is given."""
        channels = np.asarray(keep, dtype=np.int64)
        order = torch.from_numpy(np.concatenate([channels, np.setdiff1d(np.arange(n), channels)]))
        both = (None if each is None else torch.from_numpy(np.asarray(each, np.float32)) for each in (matrix, constant))
        return cls(order, len(channels), *both)

    @property
    def n(self) -> int:
        return self.order.shape[-1]

    @property
    def width(self) -> int:
        return self.kept

    @property
    def residual_width(self) -> int:
        return self.n - self.width

    def parameters(self) -> dict[str, Any]:
        return {"width": self.kept, "n": self.n}

    @property
    def keep(self) -> Tensor:
        """int64[.., d], the kept channels."""
        return self.order[..., : self.width]

    def encode(self, x: Tensor) -> Tensor:
        return self._gathered(x, self.keep)

    def residual(self, x: Tensor, z: Tensor) -> Tensor:
        dropped = self._gathered(x, self.order[..., self.width :])
        return dropped if self.constant is None else dropped - self._estimate(z)

    def asked(self, query: Tensor) -> tuple[Tensor, Tensor]:
        ordered = self._gathered(query, self.order)
        kept, dropped = ordered[..., : self.width], ordered[..., self.width :]
        return (kept if self.matrix is None else kept + dropped @ self.matrix), dropped

    def read(self, total: Tensor, residual: Tensor | None) -> Tensor:
        dropped = total.new_zeros(*total.shape[:-1], self.residual_width) if residual is None else residual
        if self.constant is not None:
            dropped = dropped + self._estimate(total)
        ordered = torch.cat([total, dropped], dim=-1)
        return torch.empty_like(ordered).scatter_(-1, self.order[..., None, :].expand(ordered.shape), ordered)

    def _estimate(self, z: Tensor) -> Tensor:
        """What the dropped channels are read as from rows z."""
        assert self.constant is not None
        constant = self.constant[..., None, :]
        return constant if self.matrix is None else z @ self.matrix.mT + constant

    def _gathered(self, x: Tensor, channels: Tensor) -> Tensor:
        return x.gather(-1, channels[..., None, :].expand(*x.shape[:-1], channels.shape[-1]))
