"""Attention over the rows and residuals that vLLM's blocks hold: one softmax, in plain torch, for any codec.

The same formulas as `grace_opt.runtime.kernels.plain`, for pages instead of buffers: a query meets every token's row,
and the residual of those that it sees whole, which are the last tokens up to its own and the sinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grace_opt.compression.method import Windows
from grace_opt.export.vllm_plugin.pages import Part

_SCORES = 1 << 22  # elements of one block of queries' scores: bounds the memory of a long prompt


@dataclass(frozen=True, eq=False)
class Held:
    """What the blocks of one request hold of a part's keys and values.

    ``rows``, ``residuals``: of keys and of values, the whole cache [B, block, heads, width]. ``row_blocks``,
    ``residual_blocks``: int[b], the request's blocks in order.
    """

    rows: Sequence[Tensor]
    residuals: Sequence[Tensor]
    row_blocks: Tensor
    residual_blocks: Tensor


def attend(part: Part, query: Tensor, held: Held, length: int, windows: Windows, scaling: float) -> Tensor:
    """Outputs [n, heads, G, Dv] of the last n of a request's ``length`` tokens, which are stored already.

    query [n, heads, G, D]: G query heads for each KV head of the part. A query at t sees the token at s <= t whole if
    t - s < recent_window or s < sinks, and as its row says otherwise. O(n length heads G (dk + dv)).
    """
    new, heads, group, _ = query.shape
    step = max(1, _SCORES // (heads * group * length))
    keys, values = (_tokens(rows, held.row_blocks, 0, length) for rows in held.rows)
    outs = []
    for low in range(0, new, step):
        high = min(low + step, new)
        seen = length - new + high
        outs.append(_attend(part, query[low:high] * scaling, (keys[:seen], values[:seen]), held, seen, windows))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _attend(
    part: Part, query: Tensor, rows: tuple[Tensor, Tensor], held: Held, length: int, windows: Windows
) -> Tensor:
    """The same for some queries in a row, scaled, of which the last is at length - 1; rows [length, heads, _]."""
    (key, value), (new, heads, group, _) = part.codecs, query.shape
    recent_window, sinks = windows.recent_window, windows.sinks
    asked, outside = key.asked(query.permute(1, 2, 0, 3).reshape(heads, group * new, -1))
    scores = (asked @ rows[0].permute(1, 2, 0)).view(heads, group, new, length)
    times = torch.arange(length, device=query.device)
    now = times[length - new :, None]
    start = max(0, length - new - recent_window + 1)  # the first token that the first of the queries sees whole
    near = now - times[start:] < recent_window
    first = min(sinks, length) if length > recent_window else 0
    apart = now - times[:first] >= recent_window  # a sink that is not among the last tokens
    if outside.shape[-1]:
        late, early = _whole(held, 0, start, length, first)
        shape = (heads, group, new, -1)
        scores[..., start:] += (outside @ late.permute(1, 2, 0)).view(shape) * near
        if early is not None:
            scores[..., :first] += (outside @ early.permute(1, 2, 0)).view(shape) * apart
    if new > 1:
        scores = scores.masked_fill(times > now, -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    residual = None
    if value.residual_width:
        late, early = _whole(held, 1, start, length, first)
        residual = (weights[..., start:] * near).flatten(1, 2) @ late.transpose(0, 1)
        if early is not None:
            residual += (weights[..., :first] * apart).flatten(1, 2) @ early.transpose(0, 1)
    out = value.read(weights.flatten(1, 2) @ rows[1].transpose(0, 1), residual)
    return out.view(heads, group, new, -1).permute(2, 0, 1, 3)


def _whole(held: Held, side: int, start: int, length: int, first: int) -> tuple[Tensor, Tensor | None]:
    """Residuals [m, heads, e] of the tokens from ``start`` on, and of the first ones; None for none of these."""
    late = _tokens(held.residuals[side], held.residual_blocks, start, length)
    return late, _tokens(held.residuals[side], held.residual_blocks, 0, first) if first else None


def _tokens(pages: Tensor, blocks: Tensor, low: int, high: int) -> Tensor:
    """Tokens low to high, [high - low, heads, width], of a request whose blocks these are."""
    block = pages.shape[1]
    first = low // block
    found = pages[blocks[first : -(-high // block)]].flatten(0, 1)
    return found[low - first * block : high - first * block]
