"""Attention over pages against dense attention in float64, in blocks that lie anywhere."""

from __future__ import annotations

import pytest
import torch

from grace_opt.compression.method import Windows
from grace_opt.export.vllm_plugin import attend as module
from grace_opt.export.vllm_plugin.attend import Held, attend
from grace_opt.export.vllm_plugin.decoding import Decoder, Stretches
from tests.support.pages import BLOCKS, GROUP, HEADS, PLANS, N, dense, parts, plans, store

TOKENS = 90
WINDOWS = pytest.mark.parametrize(("recent", "sinks"), [(8, 3), (8, 0), (0, 4), (0, 0), (1, 20), (200, 4)])


@pytest.mark.parametrize("kind", PLANS)
@WINDOWS
@pytest.mark.parametrize(("new", "length"), [(1, TOKENS), (1, 1), (17, TOKENS), (TOKENS, TOKENS), (5, 7)])
def test_as_dense_attention_of_what_is_read(
    kind: str, recent: int, sinks: int, new: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SCORES", 6 * HEADS * GROUP * length)  # a few queries at a time
    plan, windows, scaling = plans(kind), Windows(sinks, recent), 0.4
    generator = torch.Generator().manual_seed(2)
    keys, values = (torch.randn(HEADS, length, N, generator=generator) for _ in range(2))
    query = torch.randn(new, HEADS, GROUP, N, generator=generator)
    found, pages = parts(plan)
    order = [torch.randperm(60, generator=generator)[: -(-length // block)] for block in BLOCKS]
    outs = torch.zeros(new, HEADS, GROUP, N)
    for part in found:
        store(part, pages, order, (keys, values), windows, new)
        heads = list(part.heads)
        places = zip(pages, BLOCKS, (part.rows, part.residuals), strict=True)
        held = [[place.of(each, block) for place in some] for each, block, some in places]
        outs[:, heads] = attend(part, query[:, heads], Held(*held, *order), length, windows, scaling)
    expected = dense(plan, query, keys, values, windows, scaling)
    torch.testing.assert_close(outs.double(), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", PLANS)
@WINDOWS
def test_the_kernel_decodes_several_requests_as_dense_attention(kind: str, recent: int, sinks: int) -> None:
    plan, windows, scaling, lengths = plans(kind), Windows(sinks, recent), 0.4, (90, 1, 33, 8)
    generator = torch.Generator().manual_seed(3)
    found, pages = parts(plan)
    free = [torch.randperm(60, generator=generator) for _ in BLOCKS]
    query = torch.randn(len(lengths), HEADS, GROUP, N, generator=generator)
    tables = tuple(torch.zeros(len(lengths), 12, dtype=torch.long) for _ in BLOCKS)
    states = []
    for request, length in enumerate(lengths):
        states.append([torch.randn(HEADS, length, N, generator=generator) for _ in range(2)])
        for cache, block in enumerate(BLOCKS):
            count = -(-length // block)
            tables[cache][request, :count], free[cache] = free[cache][:count], free[cache][count:]
        for part in found:
            store(part, pages, [table[request] for table in tables], states[-1], windows, 1)
    at = Stretches.of(lengths, (tables[0].numpy(), tables[1].numpy()), BLOCKS, windows)
    assert at.tokens.sum(1).tolist() == list(lengths)
    outs = torch.zeros(len(lengths), HEADS, GROUP, N)
    with torch.inference_mode():
        for part in found:
            heads = list(part.heads)
            outs[:, heads] = Decoder(part, GROUP, torch.float32).attend(query[:, heads], pages, BLOCKS, at, scaling)
    for request in range(len(lengths)):
        expected = dense(plan, query[request : request + 1], *states[request], windows, scaling)
        torch.testing.assert_close(outs[request : request + 1].double(), expected, atol=2e-5, rtol=1e-4)


def test_codecs_of_one_signature_are_one_part() -> None:
    assert [part.heads for part in parts(plans("channels"))[0]] == [(0, 1)]
    assert [part.heads for part in parts(plans("ragged"))[0]] == [(0,), (1,)]
