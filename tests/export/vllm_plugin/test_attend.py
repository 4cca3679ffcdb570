"""Attention over pages against dense attention in float64, in blocks that lie anywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grace_opt.compression.channels import Channels
from grace_opt.compression.codec import Codec, stacked
from grace_opt.compression.lowrank import LowRank
from grace_opt.compression.method import Windows
from grace_opt.compression.plan import CachePlan, LayerPlan
from grace_opt.export.vllm_plugin import attend as module
from grace_opt.export.vllm_plugin.attend import Held, attend
from grace_opt.export.vllm_plugin.pages import layout

HEADS, GROUP, N, TOKENS = 2, 3, 16, 90


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


@pytest.mark.parametrize("kind", ["channels", "ragged", "keys", "values", "low rank", "whole"])
@pytest.mark.parametrize(("recent", "sinks"), [(8, 3), (8, 0), (0, 4), (0, 0), (1, 20), (200, 4)])
@pytest.mark.parametrize(("new", "length"), [(1, TOKENS), (1, 1), (17, TOKENS), (TOKENS, TOKENS), (5, 7)])
def test_as_dense_attention_of_what_is_read(
    kind: str, recent: int, sinks: int, new: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SCORES", 6 * HEADS * GROUP * length)  # a few queries at a time
    plan, windows, scaling = plans(kind), Windows(sinks, recent), 0.4
    generator = torch.Generator().manual_seed(2)
    keys, values = (torch.randn(HEADS, length, N, generator=generator) for _ in range(2))
    query = torch.randn(new, HEADS, GROUP, N, generator=generator)
    found = layout(CachePlan({0: plan}), 1, range(HEADS), N)
    blocks = (8, 12)
    pages = [
        torch.full((40, block * total), torch.nan)
        for block, total in zip(blocks, (found.rows, found.residuals), strict=True)
    ]
    order = [torch.randperm(40, generator=generator)[: -(-length // block)] for block in blocks]
    outs = torch.zeros(new, HEADS, GROUP, N)
    (parts,) = found.layers
    for part in parts:
        heads = list(part.heads)
        held = [
            [place.of(each, block) for place in places]
            for each, block, places in zip(pages, blocks, (part.rows, part.residuals), strict=True)
        ]
        for side, states in enumerate((keys, values)):
            codec, each = part.codecs[side], states[heads]
            rows = codec.encode(each)
            for cache, numbers in enumerate((rows, codec.residual(each, rows))):
                slots = torch.arange(length)
                at = order[cache][slots // blocks[cache]], slots % blocks[cache]
                forgotten = (slots >= sinks) & (length - new - slots >= recent) if cache else slots < 0
                held[cache][side][at] = torch.where(forgotten[:, None], torch.nan, numbers).transpose(0, 1)
        outs[:, heads] = attend(part, query[:, heads], Held(*held, *order), length, windows, scaling)
    expected = dense(plan, query, keys, values, windows, scaling)
    torch.testing.assert_close(outs.double(), expected, atol=2e-5, rtol=1e-4)


def test_codecs_of_one_signature_are_one_part() -> None:
    found = layout(CachePlan({0: plans("channels")}), 1, range(HEADS), N)
    assert [part.heads for part in found.layers[0]] == [(0, 1)]
    assert found.layers[0][0].codecs[0].signature()[1:2] == stacked(plans("channels").codecs["key"]).signature()[1:2]
