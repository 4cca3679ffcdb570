"""What the plug-in gives to vLLM's own block managers, and what it refuses. Run by .ci/vllm."""

from __future__ import annotations

from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_interface import FullAttentionSpec

from grace_opt.compression.method import Windows
from grace_opt.compression.plan import CachePlan
from grace_opt.errors import InputError
from grace_opt.export.vllm_plugin import connector
from grace_opt.export.vllm_plugin.caches import Batch, PagedCache
from grace_opt.export.vllm_plugin.models import CompressedAttention, _check, _heads
from grace_opt.export.vllm_plugin.pages import layout
from grace_opt.export.vllm_plugin.sinks import SinkWindowManager, SinkWindowSpec
from tests.support.pages import BLOCKS, GROUP, HEADS, PLANS, N, dense, plans

BLOCK = 16
SPEC = SinkWindowSpec(
    block_size=BLOCK, num_kv_heads=1, head_size=8, head_size_v=0, dtype=torch.float32, sliding_window=33, sinks=20
)


def manager(pool: BlockPool) -> SinkWindowManager:
    return SinkWindowManager(
        SPEC, block_pool=pool, enable_caching=True, kv_cache_group_id=0, scheduler_block_size=BLOCK
    )


def test_what_is_behind_the_window_is_freed_but_for_the_sinks() -> None:
    pool = BlockPool(40, True, BLOCK)
    held, before = manager(pool), pool.get_num_free_blocks()
    blocks = list(held.allocate_new_blocks("request", 200, 200))
    for computed in (40, 120, 200):
        held.remove_skipped_blocks("request", computed)
    now = held.req_to_blocks["request"]
    assert now[:2] == blocks[:2]  # 20 sinks, in two blocks
    assert all(block.is_null for block in now[2:10])
    assert now[10:] == blocks[10:]  # from 200 - 33 + 1 on
    assert pool.get_num_free_blocks() == before - 2 - 3
    held.free("request")
    assert pool.get_num_free_blocks() == before


def test_a_prefix_found_again_brings_its_sinks() -> None:
    pool = BlockPool(40, True, BLOCK)
    held = manager(pool)
    blocks = list(held.allocate_new_blocks("first", 160, 160))
    held.free("first")
    free = pool.get_num_free_blocks()
    null = pool.null_block
    found = [*blocks[:2], *[null] * 6, *blocks[8:]]
    needed = held.get_num_blocks_to_allocate("second", 170, found, 160, 160, 170)
    assert needed == 2 + 2 + 1  # sinks and window, which nobody holds, and a new one
    held.add_local_computed_blocks("second", found, 160, 0)
    held.allocate_new_blocks("second", 170, 170)
    now = held.req_to_blocks["second"]
    assert now[:10] == found
    assert pool.get_num_free_blocks() == free - needed


class Cached:
    """Blocks by hash."""

    hash_block_size = BLOCK
    null_block = "null"

    def __init__(self, hashes: Any) -> None:
        self.hashes = set(hashes)

    def get_cached_block(self, block_hash: int, groups: list[int]) -> list[int] | None:
        return [block_hash] * len(groups) if block_hash in self.hashes else None


@pytest.mark.parametrize(
    ("hashes", "found"),
    [
        (range(10), [0, 1, *["null"] * 6, 8, 9]),
        ([0, 1, 4, 5], [0, 1, "null", "null", 4, 5]),
        ([0, 1, 5, 8], [0, 1]),
        ([1, 8, 9], []),  # a sink is gone
        ([0, 8, 9], []),
    ],
)
def test_a_prefix_without_its_sinks_is_not_found(hashes: Any, found: list[Any]) -> None:
    blocks, length = SinkWindowManager.find_longest_cache_hit(
        list(range(10)), 160, [0], Cached(hashes), SPEC, drop_eagle_block=False, alignment_tokens=BLOCK
    )
    assert blocks == (found,)
    assert length == BLOCK * len(found)


def test_the_first_blocks_are_always_kept() -> None:
    wide = {"alignment_tokens": 8 * BLOCK, "kv_cache_spec": SPEC, "use_eagle": False}
    mask = SinkWindowManager.reachable_block_mask(0, 16, **wide)
    assert [index for index, kept in enumerate(mask) if kept] == [0, 1, 6, 7, 14, 15]
    assert SPEC.max_admission_blocks_per_request(64, 10_000) == 6 + 1 + 2


@pytest.mark.parametrize(
    ("ranks", "total", "shares"), [(1, 4, [[0, 1, 2, 3]]), (2, 4, [[0, 1], [2, 3]]), (4, 2, [[0], [0], [1], [1]])]
)
def test_kv_heads_are_dealt_out_as_vllm_does(ranks: int, total: int, shares: list[list[int]]) -> None:
    assert [_heads(rank, ranks, total, max(1, total // ranks)) for rank in range(ranks)] == shares


@pytest.mark.parametrize(
    ("part", "name", "value", "sentence"),
    [
        ("cache_config", "cache_dtype", "fp8", "a quantised KV cache"),
        ("scheduler_config", "disable_hybrid_kv_cache_manager", True, "one block table"),
        ("parallel_config", "pipeline_parallel_size", 2, "pipeline parallelism"),
        ("parallel_config", "decode_context_parallel_size", 2, "context parallelism"),
        (None, "speculative_config", object(), "speculative decoding"),
        (None, "kv_transfer_config", object(), "a KV connector"),
        ("layer", "sliding_window", 8, "sliding window"),
    ],
)
def test_settings_that_it_does_not_run_are_refused(part: str | None, name: str, value: Any, sentence: str) -> None:
    config = SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype="auto"),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, decode_context_parallel_size=1),
        model_config=SimpleNamespace(enforce_eager=True),
        speculative_config=None,
        kv_transfer_config=None,
        layer=SimpleNamespace(sliding_window=None),
    )
    _check(config, [config.layer])
    setattr(config if part is None else getattr(config, part), name, value)
    with pytest.raises(InputError, match=sentence):
        _check(config, [config.layer])


FULL = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)


@pytest.mark.parametrize(
    ("part", "name", "value", "sentence"),
    [
        ("cache_config", "cache_dtype", "fp8", "a quantised KV cache"),
        ("parallel_config", "tensor_parallel_size", 2, "tensor parallelism"),
        ("parallel_config", "pipeline_parallel_size", 2, "pipeline parallelism"),
        ("parallel_config", "decode_context_parallel_size", 2, "context parallelism"),
        (None, "speculative_config", object(), "speculative decoding"),
        ("caches", "kv_cache_groups", [SimpleNamespace(kv_cache_spec=SPEC)], "layers that do not attend to all tokens"),
        ("caches", "kv_cache_groups", [SimpleNamespace(kv_cache_spec=FULL)] * 2, "layers that do not attend"),
        ("model_config", "enforce_eager", False, "which a compiled model does not show"),
    ],
)
def test_settings_that_the_connector_does_not_run_are_refused(part: Any, name: str, value: Any, sentence: str) -> None:
    parallel = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "decode_context_parallel_size": 1}
    config = SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype="auto"),
        parallel_config=SimpleNamespace(**parallel),
        model_config=SimpleNamespace(enforce_eager=True),
        speculative_config=None,
        caches=SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=FULL)]),
    )
    connector._check(config, config.caches, True)
    setattr(config if part is None else getattr(config, part), name, value)
    with pytest.raises(InputError, match=sentence):
        connector._check(config, config.caches, True)
    if name == "enforce_eager":
        connector._check(config, config.caches, False)  # a static read-out needs no queries


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mask": "m"}, "lacks 'folder'; name the folder"),
        ({"folder": "f"}, "lacks 'mask'"),
        ({"mask": "m", "folder": "f", "key_bits": 4}, "has 'key_bits'; it may have mask, folder, dtype"),
        ({"mask": "m", "folder": "f", "dtype": "int4"}, "has the dtype 'int4'; give one of float32"),
        ({"mask": "/no/mask", "folder": "f"}, "/no/mask"),
    ],
)
def test_a_connector_says_what_its_configuration_lacks(options: dict[str, Any], sentence: str) -> None:
    config = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector_extra_config=options), model_config=None)
    with pytest.raises(InputError, match=sentence):
        connector._opened(config)


@pytest.mark.parametrize("kind", PLANS)
def test_a_step_of_long_and_single_requests_is_stored_and_attended(kind: str) -> None:
    """One request decodes, one has a chunk of its prompt, one decodes, one begins; blocks lie anywhere."""
    plan, windows, lengths, new = plans(kind), Windows(3, 8), [50, 40, 7, 21], [1, 13, 1, 21]
    found = layout(CachePlan({0: plan}), 1, range(HEADS), N)
    generator = torch.Generator().manual_seed(4)
    caches, batches = [], []
    states = [[torch.randn(HEADS, length, N, generator=generator) for _ in range(2)] for length in lengths]
    for block, total in zip(BLOCKS, (found.rows, found.residuals), strict=True):
        cache = PagedCache(f"cache.{block}", SimpleNamespace(block_size=block))
        cache.bind_kv_cache(torch.full((60, 1, block, total), torch.nan))
        caches.append(cache)
        table = torch.randperm(60, generator=generator)[:28].view(4, 7).int()
        slots = [torch.arange(length - count, length) for length, count in zip(lengths, new, strict=True)]
        at = torch.cat([row[each // block] * block + each % block for row, each in zip(table, slots, strict=True)])
        batches.append(Batch(list(accumulate(new)), lengths, table, at // block, at % block))
        for part in found.layers[0]:
            for row, each, count in zip(table, states, new, strict=True):
                for side, place in enumerate((part.rows, part.residuals)[len(caches) - 1]):
                    old = each[side][list(part.heads), : each[side].shape[1] - count]
                    codec = part.codecs[side]
                    rows = codec.encode(old)
                    numbers = rows if len(caches) == 1 else codec.residual(old, rows)
                    where = torch.arange(old.shape[1])
                    place.of(cache.pages, block)[row[where // block], where % block] = numbers.transpose(0, 1)
    stock = SimpleNamespace(layer_name="0", num_kv_heads=HEADS, head_size=N, impl=SimpleNamespace(scale=0.4))
    attention = CompressedAttention(stock, found.layers[0], windows, tuple(caches))
    query = torch.randn(sum(new), HEADS * GROUP * N, generator=generator)
    key, value = (
        torch.cat([each[side][:, -count:].transpose(0, 1).flatten(1) for each, count in zip(states, new, strict=True)])
        for side in (0, 1)
    )
    output = torch.empty_like(query)
    with torch.inference_mode():
        attention.run(query, key, value, output, batches)
    asked, outs = (each.view(-1, HEADS, GROUP, N) for each in (query, output))
    for low, each, count in zip(accumulate([0, *new]), states, new, strict=False):
        expected = dense(plan, asked[low : low + count], *each, windows, 0.4)
        torch.testing.assert_close(outs[low : low + count].double(), expected, atol=2e-5, rtol=1e-4)
