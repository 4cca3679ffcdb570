"""Random plans of a layer, tokens stored by them in blocks that lie anywhere, and dense attention over the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grace_opt.compression.channels import Channels
from grace_opt.compression.codec import Codec
from grace_opt.compression.lowrank import LowRank
from grace_opt.compression.method import Windows
from grace_opt.compression.plan import CachePlan, LayerPlan
from grace_opt.export.vllm_plugin.pages import Part, layout

HEADS, GROUP, N = 2, 3, 16
BLOCKS = (8, 12)  # tokens of a block of rows, and of residuals
PLANS = ("channels", "ragged", "keys", "values", "low rank", "whole")


def channels(rng: Any, width: int) -> Channels:
    keep = np.sort(rng.choice(N, width, replace=False))
    return Channels.keeping(keep, N, 0.3 * rng.normal(size=(N - width, width)), rng.normal(size=N - width))


def low_rank(rng: Any, width: int) -> LowRank:
    basis = torch.from_numpy(rng.normal(size=(N, N))).float()
    return LowRank(basis, torch.from_numpy(rng.normal(size=N - width)).float(), torch.linalg.inv(basis))


def plans(kind: str) -> LayerPlan:
    rng = np.random.default_rng(1)
    codecs: dict[Any, list[Codec]] = {
        "channels": {"key": [channels(rng, 6)] * 2, "value": [channels(rng, 9) for _ in range(2)]},
        "ragged": {"key": [channels(rng, 5), channels(rng, 8)], "value": [channels(rng, 9), channels(rng, 3)]},
        "keys": {"key": [channels(rng, 6) for _ in range(2)]},
        "values": {"value": [channels(rng, 6) for _ in range(2)]},
        "low rank": {"key": [low_rank(rng, 6) for _ in range(2)], "value": [channels(rng, 8) for _ in range(2)]},
        "whole": {},
    }[kind]
    return LayerPlan(0, codecs)


def dense(plan: LayerPlan, query: Tensor, keys: Tensor, values: Tensor, windows: Windows, scaling: float) -> Tensor:
    """[n, heads, G, N] of the last n tokens: each query reads each token whole, or as its row says. float64."""
    n, length = len(query), keys.shape[1]
    outs = torch.zeros(n, HEADS, GROUP, N, dtype=torch.float64)
    for head in range(HEADS):
        told = []
        for kind, states in (("key", keys), ("value", values)):
            codecs = plan.codecs.get(kind)
            codec = (
                None if codecs is None else codecs[head].mapped(lambda t: t.double() if t.is_floating_point() else t)
            )
            each = states[head].double()
            told.append((each, each if codec is None else codec.read(codec.encode(each), None)))
        for i in range(n):
            now = length - n + i
            seen = torch.arange(now + 1)
            whole = ((now - seen < windows.recent_window) | (seen < windows.sinks))[:, None]
            k, v = (torch.where(whole, exact[: now + 1], row[: now + 1]) for exact, row in told)
            weights = torch.softmax(query[i, head].double() @ k.T * scaling, dim=-1)
            outs[i, head] = weights @ v
    return outs


def parts(plan: LayerPlan) -> tuple[tuple[Part, ...], list[Tensor]]:
    """Of the layer, and the two caches' pages, as if never written to."""
    found = layout(CachePlan({0: plan}), 1, range(HEADS), N)
    sizes = zip(BLOCKS, (found.rows, found.residuals), strict=True)
    return found.layers[0], [torch.full((60, block * total), torch.nan) for block, total in sizes]


def store(
    part: Part, pages: Sequence[Tensor], order: Sequence[Tensor], states: Sequence[Tensor], windows: Windows, new: int
) -> None:
    """Keys and values [heads, tokens, N] of a request whose blocks these are; residuals that the last ``new`` queries
    do not see are not there.
    """
    slots = torch.arange(states[0].shape[1])
    forgotten = (slots >= windows.sinks) & (len(slots) - new - slots >= windows.recent_window)
    for side, each in enumerate(states):
        codec = part.codecs[side]
        rows = codec.encode(each[list(part.heads)])
        rest = torch.where(forgotten[:, None], torch.nan, codec.residual(each[list(part.heads)], rows))
        for cache, (numbers, places) in enumerate(((rows, part.rows), (rest, part.residuals))):
            block = BLOCKS[cache]
            view = places[side].of(pages[cache], block)
            view[order[cache][slots // block], slots % block] = numbers.transpose(0, 1)
