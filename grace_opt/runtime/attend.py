"""Attention over a filled channel-pruned cache: one softmax, one pass over kept keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grace_opt.runtime.buffers import Integers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from grace_opt.compression.integers import Bits
    from grace_opt.heads import Kind
    from grace_opt.runtime.attention import Pruned
    from grace_opt.runtime.side import Channels

KERNEL = find_spec("triton") is not None
INTERPRETED = False  # tests run the kernel on CPUs, in Triton's interpreter

# Scores of one block of queries, in elements: bounds the memory of chunked prefill over a long cache.
_BLOCK = 1 << 24


def attend(
    query: Tensor, handle: Pruned, mask: Tensor | None, scaling: float, dropout: float, changed: Tensor | None
) -> Tensor:
    """Outputs [B, Hq, n, Dv] of the queries [B, Hq, n, D] of the tokens that just came, under a mask [B or 1, 1, n, T].

    ``changed`` [B, Hkv, T, Dv]: whole values that the model has made of the cache's, in place of them.

    The query of a token at position t sees the token at s whole if t - s < recent_window, if s is a sink, or if both
    came in the same update (prefill attends in full, as in ThinK).
    """
    layer, new = handle.layer, query.shape[2]
    learns = torch.is_grad_enabled() and query.requires_grad
    if layer.fused and new == 1 and not dropout and changed is None and not learns:
        return _fused(query, handle, mask, scaling)
    block = max(1, _BLOCK // (query.shape[0] * query.shape[1] * layer.columns))
    if new <= block:
        return _attend(query, handle, mask, scaling, 0, dropout, changed)
    outs = []
    for low in range(0, new, block):
        part = slice(low, low + block)
        outs.append(
            _attend(
                query[:, :, part], handle, None if mask is None else mask[:, :, part], scaling, low, dropout, changed
            )
        )
    return torch.cat(outs, dim=2)


def _attend(
    query: Tensor,
    handle: Pruned,
    mask: Tensor | None,
    scaling: float,
    low: int,
    dropout: float,
    changed: Tensor | None,
) -> Tensor:
    """One block of queries, the first of them number ``low`` of the update."""
    layer = handle.layer
    keys, values = layer.held
    batch, heads, new, _ = query.shape
    kv_heads = handle.spans[0].shape[1]
    # All queries of a KV head side by side, so that the cache is read once for the whole group.
    kept, dropped = keys.asked(query.reshape(batch, kv_heads, -1, query.shape[-1]) * scaling)
    scores = keys.scores(kept).view(batch, kv_heads, -1, new, layer.columns)  # [B, H, G, n, T]
    whole = _whole(handle, low, new)
    if dropped.shape[-1]:
        whole.add(scores, dropped, handle.spans[0], keys)
    if mask is None and (new > 1 or layer.is_static):  # transformers leaves a mask out only where it would be causal
        asked = layer.length - handle.new + low + torch.arange(new, device=query.device)
        mask = (torch.arange(layer.columns, device=query.device) <= asked[:, None])[None, None]
    if mask is not None:
        mask = mask.unsqueeze(2)  # [B or 1, 1, 1, n, T]
        # The lowest finite number, not -inf: rows that are all padding must not become NaN.
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if dropout:
        weights = torch.nn.functional.dropout(weights, dropout)
    if changed is not None:
        return (weights.flatten(2, 3) @ changed).view(batch, heads, new, -1)
    rows = whole.mixed(weights, handle.spans[1], values) if values.order is not None else None
    return values.read(values.mixed(weights.flatten(2, 3)), rows).view(batch, heads, new, -1)


def kernel_reads(states: Tensor, bits: Mapping[Kind, Bits]) -> bool:
    """Whether the Triton kernel reads a cache of such states, with such integers: on a card, where Triton is."""
    if not KERNEL or not (states.is_cuda or INTERPRETED):
        return False
    if len(bits) == 1 or 3 in bits.values():  # it reads integers of both kinds or none, and codes within bytes
        return False
    from grace_opt.runtime.kernels.triton import available

    return available(states)


def _fused(query: Tensor, handle: Pruned, mask: Tensor | None, scaling: float) -> Tensor:
    """One decoded token by the Triton kernel; the same numbers as `_attend` but for rounding."""
    from grace_opt.runtime.kernels.triton import Tokens, compiled_decode, decode

    layer = handle.layer
    keys, values = layer.held
    batch, heads = query.shape[:2]
    kept, dropped = keys.asked(query.reshape(batch, handle.spans[0].shape[1], -1, query.shape[-1]) * scaling)
    tokens, first, packed = [], layer.first, None
    for held, window in zip(layer.held, handle.spans, strict=True):
        rows = torch.cat([held.sinks, window], dim=2)
        packed = held.store if isinstance(held.store, Integers) else None
        tokens.append(Tokens(held.store.tokens, rows, None if packed is None else packed.packed))
    mask = None if mask is None else mask[:, 0, 0]
    if packed is not None and packed.packed_tokens:
        # The kernel takes the integers first, then what came before them, then what came after.
        head, count = packed.head.shape[2], packed.packed_tokens
        first = first + count
        if mask is not None:
            mask = torch.cat([mask[:, head : head + count], mask[:, :head], mask[:, head + count :]], dim=1)
    if layer.is_static:
        stored = [tensor for each in tokens for tensor in (each.kept, each.rows)]
        both = compiled_decode(kept, dropped, *stored, layer.length, layer.sink_count, first, mask)
        out, rows = both[..., : values.width], both[..., values.width :]
    else:
        out, rows = decode(kept, dropped, tokens[0], tokens[1], layer.length, layer.sink_count, first, mask)
    return values.read(out, rows).view(batch, heads, 1, -1)


@dataclass(frozen=True)
class _Whole:
    """Which columns the queries see whole: a window of the last ones, and the sinks.

    ``near`` bool[n, window] and ``sinks_seen`` bool[B, n or 1, sinks]: for which of the queries; None: for all.
    """

    window: slice | Tensor
    near: Tensor | None
    sinks: slice | Tensor | None  #: int64[B, sinks] where the rows of the batch differ
    sinks_seen: Tensor | None

    def add(self, scores: Tensor, dropped: Tensor, rows: Tensor, keys: Channels) -> None:
        """Add, in place, the dropped channels' part of the scores [B, H, G, n, T] of whole tokens."""
        shape = scores.shape[:-1]
        if rows.shape[2]:
            extra = (dropped @ rows.mT).view(*shape, -1)
            extra = extra if self.near is None else extra * self.near
            if isinstance(self.window, slice):
                scores[..., self.window] += extra
            else:
                scores.index_add_(-1, self.window, extra)
        if self.sinks is None:
            return
        extra = (dropped @ keys.sinks.mT).view(*shape, -1)
        if isinstance(self.sinks, slice):
            scores[..., self.sinks] += extra
        else:
            assert self.sinks_seen is not None
            columns = self.sinks[:, None, None, None].expand(extra.shape)
            scores.scatter_add_(-1, columns, extra * self.sinks_seen[:, None, None])

    def mixed(self, weights: Tensor, rows: Tensor, values: Channels) -> Tensor:
        """Sums [B, H, G n, e] of the rows of whole tokens with weights [B, H, G, n, T]."""
        inside = weights[..., self.window] if isinstance(self.window, slice) else weights.index_select(-1, self.window)
        total = (inside if self.near is None else inside * self.near).flatten(2, 3) @ rows
        if self.sinks is None:
            return total
        if isinstance(self.sinks, slice):
            return total + weights[..., self.sinks].flatten(2, 3) @ values.sinks
        assert self.sinks_seen is not None
        columns = self.sinks[:, None, None, None].expand(*weights.shape[:-1], -1)
        there = weights.gather(-1, columns) * self.sinks_seen[:, None, None]
        return total + there.flatten(2, 3) @ values.sinks


def _whole(handle: Pruned, low: int, new: int) -> _Whole:
    """What the queries ``low`` to ``low + new`` of an update see whole."""
    layer, count = handle.layer, handle.spans[0].shape[2]
    start = layer.length - count  # where the window begins; of a static cache it may lie before the first token
    device = handle.spans[0].device
    near: Tensor | None = None  # None: all of the window is whole for every query
    stored = start + torch.arange(count, device=device) if layer.is_static or handle.new > 1 else None
    if stored is not None:
        near = (stored >= 0).expand(new, -1)
        if handle.new > 1:
            asked = layer.length - handle.new + low + torch.arange(new, device=device)[:, None]
            near = near & ((asked - stored < layer.recent_window) | (stored >= layer.length - handle.new))
    window = stored.clamp(min=0) if layer.is_static and stored is not None else slice(start, layer.length)
    if not layer.sink_count:
        return _Whole(window, near, None, None)
    if layer.sinks_start is not None:  # all rows alike
        if layer.sinks_end <= start:
            return _Whole(window, near, slice(layer.sinks_start, layer.sinks_end), None)
        if handle.new == 1 and layer.sinks_start >= start:
            return _Whole(window, near, None, None)
    column = layer.sink_columns()
    outside = (column < start)[:, None]  # what lies in the window has been counted, if it is near
    if near is not None and count:
        inside = (column - start).clamp(0, count - 1)
        outside = outside | ~near[:, inside].transpose(0, 1)
    outside = outside & (column < layer.length)[:, None]
    return _Whole(window, near, column.clamp(max=layer.columns - 1), outside)
