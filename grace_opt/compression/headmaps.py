"""How a compressed cache layer stores and reads a token: one linear map for each KV head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grace_opt.compression.integers import Axis, Bits, Packed, quantise
from grace_opt.compression.readout import Moments, Readout
from grace_opt.graphs.bundle import Kind
from grace_opt.problem import FloatArray, IntArray

KINDS: tuple[Kind, Kind] = ("key", "value")
AXES: dict[Kind, Axis] = {"key": "channel", "value": "token"}  # of the integers' scales, as KIVI (arXiv 2402.02750)


@dataclass(frozen=True, eq=False)
class HeadMap:
    """How one KV head stores a token x, and reads it back: x~ = constant + decode (encode x).

    ``encode`` is the kept channels int64[d], or a projection float32[d, n]; ``decode`` float32[n, d]; ``constant``
    float32[n]. With ``bits``, what encode gives is held as packed integers of so many bits, with scales along ``axis``.
    """

    encode: Tensor
    decode: Tensor
    constant: Tensor
    bits: Bits | None = None
    axis: Axis = "channel"

    @property
    def width(self) -> int:
        """d: how many numbers are held for a token."""
        return self.decode.shape[1]

    def store(self, x: Tensor) -> Tensor | Packed:
        """What is held of tokens x [T, n]: [T, d] in x's dtype, or packed integers."""
        channels = self.encode.dtype == torch.int64
        held = x[:, self.encode] if channels else (x.float() @ self.encode.mT).to(x.dtype)
        return held if self.bits is None else quantise(held, self.bits, self.axis)

    def read(self, stored: Tensor | Packed) -> Tensor:
        """The tokens as attention sees them, [T, n], in the dtype of what was stored."""
        held = stored.unpack() if isinstance(stored, Packed) else stored
        return (held.float() @ self.decode.mT + self.constant).to(held.dtype)

    def parameter_bytes(self, element_size: int) -> int:
        """Bytes of the map itself in a cache of that element size: kept channels (int32) or projection, read-out."""
        n, width = self.decode.shape
        if self.encode.dtype != torch.int64:
            return element_size * (2 * n * width + n)
        dropped = torch.ones(n, dtype=torch.bool, device=self.decode.device)
        dropped[self.encode] = False
        estimate = (width if self.decode[dropped].any() else 0) + int(self.constant[dropped].any())
        return 4 * width * (width < n) + element_size * (n - width) * estimate


@dataclass(frozen=True, eq=False)
class LayerMaps:
    """The maps of one layer's KV heads, by kind; a kind that is left out stays whole."""

    heads: Mapping[Kind, Sequence[HeadMap]] = field(default_factory=dict)
    hidden: bool = False  #: old tokens are not seen at all


@dataclass
class Compression:
    """How the cache of a prompt is compressed: the maps of every layer; layers left out stay whole."""

    layers: dict[int, LayerMaps]
    recent_window: int
    sinks: int

    def widths(self, kind: Kind) -> dict[int, list[int]]:
        """Layer -> numbers held for a token by each KV head, of the layers whose keys (or values) are compressed."""
        return {i: [head.width for head in each.heads[kind]] for i, each in self.layers.items() if kind in each.heads}


def channel_map(
    keep: IntArray, n: int, readout: Readout | None, device: Any, bits: Bits | None = None, axis: Axis = "channel"
) -> HeadMap:
    """The map that keeps channels int[d] of n, and reads the others by a read-out, or as zeros."""
    decode, constant = np.zeros((n, len(keep))), np.zeros(n)
    decode[keep, np.arange(len(keep))] = 1.0
    if readout is not None:
        dropped = np.setdiff1d(np.arange(n), keep)
        decode[dropped], constant[dropped] = readout.matrix, readout.constant
    return _head_map(torch.as_tensor(keep, dtype=torch.int64), decode, constant, device, bits, axis)


def subspace_map(about: Moments, width: int, metric: FloatArray | None, device: Any) -> HeadMap:
    """The best linear map of a width for tokens with these moments, about their mean (Eckart and Young, 1936).

    Best in the metric float64[n, n], positive semidefinite (None: the identity): it has the least expected error e'Me.
    """
    n = len(about.mean)
    root = np.eye(n)
    if metric is not None:
        root = np.linalg.cholesky(metric + (1e-6 * np.trace(metric) / n or 1.0) * np.eye(n))
    _, vectors = np.linalg.eigh(root.T @ about.covariance @ root)
    top = vectors[:, n - width :]
    encode, decode = top.T @ root.T, np.linalg.solve(root.T, top)
    return _head_map(
        torch.as_tensor(encode, dtype=torch.float32), decode, about.mean - decode @ (encode @ about.mean), device
    )


def _head_map(
    encode: Tensor,
    decode: FloatArray,
    constant: FloatArray,
    device: Any,
    bits: Bits | None = None,
    axis: Axis = "channel",
) -> HeadMap:
    return HeadMap(
        encode.to(device),
        torch.as_tensor(decode, dtype=torch.float32, device=device),
        torch.as_tensor(constant, dtype=torch.float32, device=device),
        bits,
        axis,
    )
