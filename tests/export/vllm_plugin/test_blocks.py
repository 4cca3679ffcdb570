"""Keys and values in blocks of any packing: what a backend stores is read, and what is written is what it reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from grace_opt.errors import InputError
from grace_opt.export.vllm_plugin.blocks import Blocks

HEADS, BLOCK, SIZE, COUNT = 3, 16, 8, 7


def side_by_side(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
    """A token's key and value one after the other."""
    cache[slots // BLOCK, :, slots % BLOCK] = torch.cat([keys, values], -1)


def transposed(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
    """A block's keys by channel, four tokens side by side; then its values."""
    flat = cache.view(len(cache), HEADS, 2, BLOCK * SIZE)
    for key, value, slot in zip(keys, values, slots.tolist(), strict=True):
        block, at = divmod(slot, BLOCK)
        channels = torch.arange(SIZE)
        flat[block, :, 0, (at // 4) * 4 * SIZE + channels * 4 + at % 4] = key
        flat[block, :, 1, at * SIZE + channels] = value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("writes", [side_by_side, transposed])
def test_blocks_are_read_as_they_were_stored_and_back(writes: Callable[..., None], dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    cache = torch.full((COUNT, HEADS, BLOCK, 2 * SIZE), torch.nan, dtype=dtype)
    before = cache.clone()
    blocks = Blocks(cache, SIZE, writes)
    assert torch.equal(cache.isnan(), before.isnan())  # looking does not write
    ids = [5, 0, 3]
    keys, values = (torch.randn(len(ids) * BLOCK, HEADS, SIZE, generator=rng).to(dtype) for _ in "kv")
    at = torch.arange(len(ids) * BLOCK)
    writes(keys, values, cache, torch.tensor(ids)[at // BLOCK] * BLOCK + at % BLOCK)
    found = blocks.read(cache, ids)
    for states, wanted in zip(found, (keys, values), strict=True):
        assert torch.equal(states[0], wanted.transpose(0, 1))
    other = torch.full_like(cache, torch.nan)
    blocks.write(other, ids, *found)
    assert torch.equal(other[ids], cache[ids])
    assert other[[1, 2, 4, 6]].isnan().all()


def test_a_cache_may_lie_otherwise_in_memory() -> None:
    """Tokens before heads, as backends for cards have it, and numbers that nobody uses."""
    cache = torch.zeros(COUNT, BLOCK, HEADS, 2 * SIZE).transpose(1, 2)
    blocks = Blocks(cache, SIZE, side_by_side)
    keys, values = (torch.randn(1, HEADS, 2 * BLOCK, SIZE) for _ in "kv")
    blocks.write(cache, [4, 1], keys, values)
    assert torch.equal(cache[4, :, :, :SIZE], keys[0, :, :BLOCK])
    assert all(map(torch.equal, blocks.read(cache, [4, 1]), (keys, values)))


def test_a_backend_that_rounds_is_refused() -> None:
    def rounds(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
        side_by_side((keys / 2).floor() * 2, values, cache, slots)

    with pytest.raises(InputError, match="does not hold keys and values number by number"):
        Blocks(torch.zeros(1, HEADS, BLOCK, 2 * SIZE), SIZE, rounds)
