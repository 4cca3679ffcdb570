"""The Triton kernels behind the contract: one decoded token on a card."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grace_opt.compression.channels import Channels
from grace_opt.compression.codec import Codec, Whole
from grace_opt.compression.integers import without_integers
from grace_opt.compression.tiles import BITS, Tiles
from grace_opt.runtime.kernels import triton
from grace_opt.runtime.kernels.contract import Request, by_head, one_token
from grace_opt.runtime.packed import Packed

if TYPE_CHECKING:
    from grace_opt.runtime.layer import PrunedLayer
    from grace_opt.runtime.side import Side

INTERPRETED = False  # tests run the kernel on CPUs, in Triton's interpreter


class TritonKernel:
    """Channels, whole rows, or what any codec makes of them, in floating point or as integers of 4 or 8 bits; sinks and
    one window of whole tokens."""

    name = "triton"

    def reads(self, layer: PrunedLayer) -> bool | str:
        """True on an NVIDIA card of compute capability 8.0 or higher, for what the kernels can decode."""
        if (answer := by_head(layer)) is not True:
            return answer
        if any(side.codec.block and not isinstance(side.codec, Tiles) for side in layer.sides):
            return f"it unpacks integers of {' or '.join(map(str, BITS))} bits only"
        bits = [side.bits for side in layer.sides]
        if max(bits) and (0 in bits or layer.dtype.itemsize != 2):
            return "it reads integers of both sides or none, in caches of 16 bits"
        if layer.extra is not None:
            return "it knows no whole tokens but sinks and the recent window"
        if layer.is_static and max(bits):
            return "it reads integers of a cache that grows"
        if not (layer.first.is_cuda or INTERPRETED):
            return "it runs on cards"
        return (
            triton.missing(layer.first)
            or triton.too_wide(*(_stored(side, layer.length) for side in layer.sides))
            or True
        )

    def takes(self, request: Request) -> bool | str:
        """True for one token of each row, outside of training, if the model did not change the values."""
        if (answer := one_token(request)) is not True:
            return answer
        if torch.is_grad_enabled() and request.query.requires_grad:
            return "it has no gradient"
        if request.query.shape[1] > triton.MOST_QUERIES * request.handle.layer.key_side.whole.shape[1]:
            return f"it takes at most {triton.MOST_QUERIES} query heads of a KV head"
        return True

    def attend(self, request: Request) -> Tensor:
        """Outputs [B, Hq, 1, Dv]; stores the new token if it was not stored yet."""
        handle, query, layer = request.handle, request.query, request.handle.layer
        keys, values = layer.sides
        batch, heads = query.shape[:2]
        kv_heads = keys.whole.shape[1]
        if not _native(keys.codec):
            handle.store(0)
            parts = keys.codec.asked(query.reshape(batch, kv_heads, -1, query.shape[-1]))
            query = torch.cat(parts, dim=-1).view(batch, heads, 1, -1)
        if not _native(values.codec):
            handle.store(1)
        for side, new in zip(layer.sides, handle.pending, strict=True):
            if new is not None:
                side.window.admit()
        both = [_stored(side, layer.length, new) for side, new in zip(layer.sides, handle.pending, strict=True)]
        handle.pending = [None, None]
        span = keys.window.span(layer.length)
        mask = None if request.mask is None else request.mask[:, 0, 0]
        whole = triton.Whole(layer.sink_count, span.count, span.begins)
        decode = triton.compiled_decode if layer.is_static else triton.decode
        out = decode(query, both[0], both[1], layer.length, layer.first, whole, mask, request.scaling)
        if _native(values.codec):
            return out
        sums, width = out.view(batch, kv_heads, -1, out.shape[-1]), values.codec.width
        return values.codec.read(sums[..., :width], sums[..., width:]).view(batch, heads, 1, -1)


def _native(codec: Codec) -> bool:
    """Whether the kernels gather channels and apply read-outs themselves."""
    return isinstance(without_integers(codec), Channels | Whole)


def _codes(buffer: Packed, bits: int) -> triton.Codes | None:
    if not buffer.blocks:
        return None
    codes, scales = (each.buffer for each in buffer.blocks)
    return triton.Codes(codes, scales, buffer.counts, bits, buffer.head)


def _stored(side: Side, length: int | Tensor, new: Tensor | None = None) -> triton.Stored:
    codec, span = without_integers(side.codec), side.window.span(length)
    channels = codec if isinstance(codec, Channels) else None
    packed = side.buffer if isinstance(side.buffer, Packed) else None
    return triton.Stored(
        side.buffer.tensors()[0] if packed is None else packed.last.buffer,
        codec.width,
        span.rows,
        span.base,
        side.whole,
        None if channels is None else channels.order,
        None if channels is None else channels.matrix,
        None if channels is None else channels.constant,
        new if new is None or new.stride(3) == 1 else new.contiguous(),
        0 if packed is None else packed.held_from,
        None if packed is None else _codes(packed, side.bits),
    )
