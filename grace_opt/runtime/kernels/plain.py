"""The plain kernel: every codec, every mask, on any device. The reference of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from grace_opt.runtime.handle import Handle
    from grace_opt.runtime.kernels.contract import Request
    from grace_opt.runtime.layer import PrunedLayer
    from grace_opt.runtime.side import Side


class Plain:
    """Scores of all rows, plus those of residuals where tokens are whole; one softmax; the same for values."""

    name = "plain"

    def reads(self, layer: PrunedLayer) -> bool | str:
        """True: it reads whatever a codec does."""
        return True

    def takes(self, request: Request) -> bool | str:
        """True."""
        return True

    def attend(self, request: Request) -> Tensor:
        """Outputs [B, Hq, n, Dv]."""
        handle, query = request.handle, request.query
        layer = handle.layer
        keys, values = layer.sides
        batch, heads, new, _ = query.shape
        kv_heads = handle.spans[0].shape[1]
        # All queries of a KV head side by side, so that the cache is read once for the whole group.
        asked, outside = keys.asked(query.reshape(batch, kv_heads, -1, query.shape[-1]) * request.scaling)
        scores = keys.scores(asked, layer.positions).view(batch, kv_heads, -1, new, layer.columns)  # [B, H, G, n, T]
        whole = _whole(handle, request.low, new)
        if outside.shape[-1]:
            whole.add(scores, outside, handle.spans[0], keys)
        mask = request.mask
        if mask is None and (handle.new > 1 or layer.is_static):  # left out only where it would be causal
            mask = layer.causal(handle.new)[:, :, request.low : request.low + new]
        if mask is not None:
            mask = mask.unsqueeze(2)  # [B or 1, 1, 1, n, T]
            # The lowest finite number, not -inf: rows that are all padding must not become NaN.
            lowest = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        if request.dropout:
            weights = torch.nn.functional.dropout(weights, request.dropout)
        if request.changed is not None:
            return (weights.flatten(2, 3) @ request.changed).view(batch, heads, new, -1)
        residual = whole.mixed(weights, handle.spans[1], values) if values.codec.residual_width else None
        total = values.mixed(weights.flatten(2, 3))
        return values.codec.read(total, residual).view(batch, heads, new, -1)


@dataclass(frozen=True)
class _Whole:
    """Which slots the queries see whole: a window of the last ones, and those outside of it.

    ``near`` bool[n, window] and ``apart_seen`` bool[B, n or 1, K]: for which of the queries; None: for all.
    """

    window: slice | Tensor
    near: Tensor | None
    apart: slice | Tensor | None  #: int64[B, K] where the rows of the batch differ
    apart_seen: Tensor | None

    def add(self, scores: Tensor, outside: Tensor, residuals: Tensor, keys: Side) -> None:
        """Add, in place, the residuals' part of the scores [B, H, G, n, T] of whole tokens."""
        shape = scores.shape[:-1]
        if residuals.shape[2]:
            extra = (outside @ residuals.mT).view(*shape, -1)
            extra = extra if self.near is None else extra * self.near
            if isinstance(self.window, slice):
                scores[..., self.window] += extra
            else:
                scores.index_add_(-1, self.window, extra)
        if self.apart is None:
            return
        extra = (outside @ keys.whole.mT).view(*shape, -1)
        if isinstance(self.apart, slice):
            scores[..., self.apart] += extra
        else:
            assert self.apart_seen is not None
            columns = self.apart[:, None, None, None].expand(extra.shape)
            scores.scatter_add_(-1, columns, extra * self.apart_seen[:, None, None])

    def mixed(self, weights: Tensor, residuals: Tensor, values: Side) -> Tensor:
        """Sums [B, H, G n, e] of the residuals of whole tokens with weights [B, H, G, n, T]."""
        inside = weights[..., self.window] if isinstance(self.window, slice) else weights.index_select(-1, self.window)
        total = (inside if self.near is None else inside * self.near).flatten(2, 3) @ residuals
        if self.apart is None:
            return total
        if isinstance(self.apart, slice):
            return total + weights[..., self.apart].flatten(2, 3) @ values.whole
        assert self.apart_seen is not None
        columns = self.apart[:, None, None, None].expand(*weights.shape[:-1], -1)
        there = weights.gather(-1, columns) * self.apart_seen[:, None, None]
        return total + there.flatten(2, 3) @ values.whole


def _whole(handle: Handle, low: int, new: int) -> _Whole:
    """What the queries ``low`` to ``low + new`` of an update see whole."""
    layer, count = handle.layer, handle.spans[0].shape[2]
    device = handle.spans[0].device
    start = layer.window_start(count)  # of a static sliding window it may lie before the first token
    near: Tensor | None = None  # None: all of the window is whole for every query
    stored = start + torch.arange(count, device=device) if layer.is_static or handle.new > 1 else None
    if stored is not None:
        asked = layer.length - handle.new + low + torch.arange(new, device=device)
        near = layer.near(asked, stored, handle.new)
        if layer.is_static and not layer.keeps:
            there = (stored >= 0).expand(new, -1)
            near = there if near is None else near & there
    fixed = layer.is_static and not layer.keeps
    window = stored.clamp(min=0) if fixed and stored is not None else slice(start, start + count)
    if layer.extra is None:
        if not layer.sink_count:
            return _Whole(window, near, None, None)
        if layer.sinks_start is not None:  # all rows alike
            if layer.sinks_end <= start:
                return _Whole(window, near, slice(layer.sinks_start, layer.sinks_end), None)
            if handle.new == 1 and layer.sinks_start >= start:
                return _Whole(window, near, None, None)
    column = layer.whole_columns()
    seen = ((column < start) & (column >= 0))[:, None]  # what lies in the window has been counted, if it is near
    if near is not None and count:
        inside = (column - start).clamp(0, count - 1)
        seen = seen | ((column >= start)[:, None] & ~near[:, inside].transpose(0, 1))
    seen = seen & (column < layer.length)[:, None]
    return _Whole(window, near, column.clamp(0, layer.columns - 1), seen)
