"""Plain, slow references that the fast code must equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.integrations.sdpa_attention import repeat_kv

from grace_opt.compression.cskv import Cskv
from grace_opt.compression.lowrank import LowRank
from grace_opt.compression.mask import KVMask
from grace_opt.heads import Kind
from grace_opt.models.attention import register
from grace_opt.models.rotary import Turn, rotary_of
from grace_opt.problem import SubsetProblem

NAME = "reference_zero_channels"


def projected(codec: Any, tokens: Any) -> Any:
    """Tokens [.., n] of which the first coordinates T x are kept and the others are a constant."""
    coordinates = tokens.double() @ codec.basis.double().mT
    coordinates[..., codec.width :] = codec.constant.double()
    return (coordinates @ torch.linalg.inv(codec.basis.double()).mT).to(tokens.dtype)


def rebuilt(codec: Cskv, states: torch.Tensor, turn: Turn | None, first: torch.Tensor) -> torch.Tensor:
    """Keys or values [B, H, T, n] as a joint rank reads them, explicitly: keys before RoPE, turned by ``turn``, and
    back to their positions, which count from each row's first real token int64[B]."""
    positions = (torch.arange(states.shape[2]) - first[:, None]).clamp(min=0)
    table = None if turn is None else turn.table
    plain = states if table is None else table.back(states, positions)
    side_by_side = torch.cat(list(plain.unbind(1)), dim=-1).double()
    codes = side_by_side @ codec.basis.double().mT
    found = codes @ codec.basis.double()
    found = found + (0 if codec.constant is None else codec.constant.double())
    by_head = torch.stack(found.to(states.dtype).chunk(states.shape[1], dim=-1), dim=1)
    return by_head if table is None else table.forth(by_head, positions)


def greedy_by_objective(problem: SubsetProblem) -> list[int]:
    """Forward greedy as a plain loop over candidates and their edges, O(n^2 m)."""
    pruned: list[int] = []
    for _ in range(problem.prune):
        best, best_cost = -1, np.inf
        for k in range(problem.n):
            if k in pruned or (problem.protected is not None and problem.protected[k]):
                continue
            cost = problem.weights[k, k] + 2 * sum(problem.weights[k, j] for j in pruned)
            if cost < best_cost:
                best, best_cost = k, cost
        pruned.append(best)
    return sorted(pruned)


def use_zero_channel_attention(model: Any, mask: KVMask, prompts: dict[int, int] | None = None) -> None:
    """Make ``model`` attend over a plain cache as if ``mask`` had zeroed the pruned channels of old tokens, or as if it
    read them by its static read-out, or projected them.

    The query at slot t sees the key at slot s whole if both came in the same prompt or chunk, if
    t - s < recent_window, or if s is among the row's first ``sinks`` real tokens; where generated tokens are kept, also
    if s is at least the prompt's length (of the first update) less recent_window. Everything by definition, with
    full-width tensors and a [B, n, T] table of which pairs are whole. ``prompts``: layer -> the prompt's length, to go
    on with what an earlier call saw.
    """
    windows, rotary = mask.windows, rotary_of(model)
    if any(isinstance(codec, Cskv) for layer in mask.plan for codec in layer.codecs.get("key", ())):
        rotary.layers()
    prompt: dict[int, int] = {} if prompts is None else prompts

    def read(kind: Kind, layer: int, states: Any, first: Any) -> Any:
        """Keys or values as pruned tokens are seen."""
        codecs = mask.plan.layers[layer].codecs.get(kind, ()) if layer in mask.plan.layers else ()
        if codecs and isinstance(codecs[0], Cskv):
            return rebuilt(codecs[0], states, Turn(rotary, layer) if kind == "key" else None, first)
        if codecs and all(isinstance(codec, LowRank) for codec in codecs):
            return torch.stack([projected(codec, states[:, head]) for head, codec in enumerate(codecs)], dim=1)
        keeps = mask.key_keep if kind == "key" else mask.value_keep
        if layer not in keeps:
            return states
        out = torch.zeros_like(states)
        for head, kept in enumerate(keeps[layer]):
            out[:, head, :, kept] = states[:, head][..., kept]
            if (static := mask.static_readout(kind, layer, head)) is not None:
                dropped = np.setdiff1d(np.arange(states.shape[-1]), kept)
                matrix, constant = (
                    torch.as_tensor(array, dtype=states.dtype) for array in (static.matrix, static.constant)
                )
                out[:, head, :, dropped] = states[:, head][..., kept] @ matrix.mT + constant
        return out

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: Any = None, **kwargs: Any
    ) -> Any:
        rows, _, new, dim = query.shape
        tokens = key.shape[2]
        asked, stored = torch.arange(tokens - new, tokens)[:, None], torch.arange(tokens)
        near = asked - stored < windows.recent_window
        if new == tokens:
            prompt[module.layer_idx] = tokens
        if windows.generated == "keep":
            near = near | (stored >= prompt[module.layer_idx] - windows.recent_window)
        whole = (near | ((new > 1) & (stored >= tokens - new))).repeat(rows, 1, 1)
        if new == tokens:
            whole[:] = True
        visible = (stored <= asked).repeat(rows, 1, 1, 1) if attention_mask is None else attention_mask
        first = torch.zeros(rows, dtype=torch.long)
        for row in range(rows):
            seen = visible[min(row, len(visible) - 1), 0, -1].nonzero()[:, 0]
            whole[row, :, seen[: windows.sinks]] = True
            first[row] = seen[0] if len(seen) else tokens
        group = query.shape[1] // key.shape[1]
        if kwargs.get("sliding_window") is not None:
            whole[:] = True
        full, pruned = (query @ repeat_kv(x, group).mT for x in (key, read("key", module.layer_idx, key, first)))
        scores = torch.where(whole[:, None], full, pruned) * (dim**-0.5 if scaling is None else scaling)
        weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
        out = (weights * whole[:, None]) @ repeat_kv(value, group)
        out = out + (weights * ~whole[:, None]) @ repeat_kv(read("value", module.layer_idx, value, first), group)
        return out.transpose(1, 2).contiguous(), None

    register(NAME, attend)
    model.set_attn_implementation(NAME)
