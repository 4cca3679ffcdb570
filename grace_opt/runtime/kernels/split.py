"""The split-KV kernel (`grace_opt.runtime.kernels.triton`) behind the contract: one decoded token on a card."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grace_opt.compression.integers import Integers, Packed
from grace_opt.runtime.kernels import triton
from grace_opt.runtime.kernels.contract import Request, one_token
from grace_opt.runtime.packed import Packed as PackedBuffer

if TYPE_CHECKING:
    from grace_opt.runtime.layer import PrunedLayer
    from grace_opt.runtime.side import Side

INTERPRETED = False  # tests run the kernel on CPUs, in Triton's interpreter


class TritonKernel:
    """Rows in floating point, or integers of 2, 4 or 8 bits of both sides; sinks and one window of whole tokens."""

    name = "triton"

    def reads(self, layer: PrunedLayer) -> bool | str:
        """True on a card of compute capability 8.0 or higher, for what the kernel can decode."""
        bits = [side.bits for side in layer.sides]
        if any(side.codec.block and not isinstance(side.codec, Integers) for side in layer.sides):
            return "it unpacks integers only"
        if 3 in bits or (0 in bits and max(bits)):
            return "it reads integers of both sides or none, and codes within bytes"
        if layer.extra is not None:
            return "it knows no whole tokens but sinks and the recent window"
        if layer.is_static and max(bits):
            return "it reads integers of a cache that grows"
        if layer.is_static and layer.keeps:
            return "its window ends at the last token, and a preallocated one that keeps generated tokens does not"
        on_card = (layer.first.is_cuda or INTERPRETED) and triton.available(layer.first)
        return on_card or "it runs on cards of compute capability 8.0 or higher"

    def takes(self, request: Request) -> bool | str:
        """True for one token of each row, outside of training, if the model did not change the values."""
        if (answer := one_token(request)) is not True:
            return answer
        if torch.is_grad_enabled() and request.query.requires_grad:
            return "it has no gradient"
        return True

    def attend(self, request: Request) -> Tensor:
        """Outputs [B, Hq, 1, Dv]."""
        handle, query, layer = request.handle, request.query, request.handle.layer
        keys, values = layer.sides
        batch, heads = query.shape[:2]
        asked = query.reshape(batch, handle.spans[0].shape[1], -1, query.shape[-1]) * request.scaling
        row, outside = keys.codec.asked(asked)
        tokens = []
        for side, span in zip(layer.sides, handle.spans, strict=True):
            tokens.append(triton.Tokens(side.buffer.tokens, torch.cat([side.whole, span], dim=2), _packed(side)))
        mask = None if request.mask is None else request.mask[:, 0, 0]
        length, first = layer.length, layer.first
        buffer = keys.buffer
        if isinstance(buffer, PackedBuffer) and buffer.packed_tokens:
            if (places := buffer.places()) is not None:  # values lie as keys do
                length, mask = places.slot.shape[1], places.mask(mask)
                first = places.column.gather(1, first[:, None].clamp(max=layer.length - 1))[:, 0]
            # The kernel takes the integers first, then the sinks, which came before them, then what came after.
            head, count = buffer.head.shape[2], buffer.packed_tokens
            first = torch.where(first < head, first + count, first)
            if mask is not None:
                mask = torch.cat([mask[:, head : head + count], mask[:, :head], mask[:, head + count :]], dim=1)
        if layer.is_static:
            stored = [tensor for each in tokens for tensor in (each.kept, each.rows)]
            both = triton.compiled_decode(row, outside, *stored, layer.length, layer.sink_count, first, mask)
            total, residual = both[..., : values.codec.width], both[..., values.codec.width :]
        else:
            total, residual = triton.decode(row, outside, tokens[0], tokens[1], length, layer.sink_count, first, mask)
        return values.codec.read(total, residual).view(batch, heads, 1, -1)


def _packed(side: Side) -> Packed | None:
    buffer = side.buffer
    if not isinstance(buffer, PackedBuffer) or not buffer.blocks or not isinstance(side.codec, Integers):
        return None
    return side.codec.packed(buffer.held(), buffer.last.buffer.dtype)
