"""What the plug-in gives to vLLM's own block managers, and what it refuses. Run by .ci/vllm."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool

from grace_opt.errors import InputError
from grace_opt.export.vllm_plugin.models import _check, _heads
from grace_opt.export.vllm_plugin.sinks import SinkWindowManager, SinkWindowSpec

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
