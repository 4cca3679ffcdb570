"""Keys and values of whole blocks, out of vLLM's paged caches and into them, whatever a backend packs them like.

Attention backends differ in how keys and values lie in a block (the one for CPUs transposes and interleaves keys). So
where a number lies is asked of the backend itself: it stores keys and values that are counted through, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from grace_opt.errors import InputError

#: stores keys and values [tokens, heads, size] in a cache at slots int64[tokens], as a backend does
Writes = Callable[[Tensor, Tensor, Tensor, Tensor], None]
_BITS = 7  # of a count that are written at a time: exact in every dtype of a cache


class Blocks:
    """The caches [blocks, heads, block, 2 size] of one backend: in which order a block holds its numbers.

    Args:
        like: one of them. It is not written to.
        size: channels of a key, and of a value.
        writes: the backend's own way in.

    Raises:
        InputError: for a backend that does not give back what was stored, number by number.
    """

    def __init__(self, like: Tensor, size: int, writes: Writes) -> None:
        self.heads, self.block, self.size = like.shape[1], like.shape[2], size
        counted = torch.arange(2 * self.block * self.heads * size, device=like.device)
        found = torch.zeros(like[:1].numel(), dtype=torch.int64, device=like.device)
        slots = torch.arange(self.block, device=like.device)
        for low in range(0, counted.numel().bit_length(), _BITS):
            digits = (counted >> low) % (1 << _BITS)
            scratch = torch.full_like(like[:1], -1)
            keys, values = digits.to(like.dtype).view(2, self.block, self.heads, size)
            writes(keys, values, scratch, slots)
            found += scratch.reshape(-1).long() << low
        used = (found >= 0).nonzero()[:, 0]
        at = used[found[used].argsort()]
        if not torch.equal(found[at], counted):
            raise InputError(
                "this attention backend of vLLM does not hold keys and values number by number, so they cannot be "
                "stored; choose another one (--attention-backend), or leave the connector out"
            )
        self._at = at.view(2, self.block, self.heads, size).permute(0, 2, 1, 3).reshape(-1)

    def read(self, cache: Tensor, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Keys and values [1, heads, tokens, size] of these blocks, in their order; a copy."""
        rows = cache[torch.tensor(ids, device=cache.device)].flatten(1)
        parts = rows.index_select(1, self._at).view(len(ids), 2, self.heads, self.block, self.size)
        keys, values = parts.permute(1, 2, 0, 3, 4).reshape(2, 1, self.heads, -1, self.size)
        return keys, values

    def write(self, cache: Tensor, ids: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Put keys and values [1, heads, tokens, size] into these blocks, which they fill."""
        where = torch.tensor(ids, device=cache.device)
        rows = cache[where].flatten(1)
        both = torch.cat([keys, values]).to(cache).view(2, self.heads, len(ids), self.block, self.size)
        rows[:, self._at] = both.permute(2, 0, 1, 3, 4).reshape(len(ids), -1)
        cache[where] = rows.view(len(ids), *cache.shape[1:])
