"""Where a preallocated cache layer holds rows as packed integers: `packed` in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from grace_opt.compression.codec import Codec
from grace_opt.runtime.buffers import fix, taken, waits_for_no_device
from grace_opt.runtime.packed import Places, unpacked
from grace_opt.runtime.windows import ring_runs


class FixedPacked:
    """As `Packed`, but no shape or address changes, and a decoded token waits for no device.

    Rows that are held as they came lie in a ring, that of slot t at t modulo its size. Columns are the sinks, the
    blocks (on a CPU those in use, elsewhere all that there is room for), and the ring.

    Args:
        like: [B, H, _, width], of the dtype and device of the rows.
        sinks, keep: as of `Packed`.
        capacity: slots.
        kept: how many tokens after the prompt stay as they come; 0: they are packed as they get old.
        first: int64[B], the slot of each row's first token; length: int64, slots in use. Both are the layer's own.
    """

    def __init__(
        self, like: Tensor, codec: Codec, sinks: int, keep: int, capacity: int, kept: int, first: Tensor, length: Tensor
    ) -> None:
        (batch, heads, _, width), block = like.shape, codec.block
        self.codec, self.sinks, self.keep, self.capacity, self.kept = codec, sinks, keep, capacity, kept
        self.length, self.first, self.count = length, first.clone(), torch.zeros_like(first)
        # A first block waits until so many tokens have come, and its sinks with it.
        self.ring = like.new_zeros(batch, heads, sinks + keep + 2 * block + kept, width)
        self.head = like.new_zeros(batch, heads, sinks, width)
        one = codec.pack(like.new_zeros(batch, heads, 1, block, width))
        self.blocks = [each.new_zeros(batch, heads, max(1, capacity // block), *each.shape[3:]) for each in one]
        self._waiting: Tensor | None = None  # several tokens, until `pack` says where rows begin
        self._keeps = False  # whether what comes stays as it comes
        fix(*self.tensors())

    # ------------------------------------------------------------ rows in slots

    def reserve(self, end: int | Tensor) -> None:
        pass

    def put(self, rows: Tensor, at: int | Tensor) -> None:
        if rows.shape[2] == 1 or self._keeps:
            self._write(rows, at)
        else:
            self._waiting = rows

    def _write(self, rows: Tensor, at: int | Tensor) -> None:
        slots = at + torch.arange(rows.shape[2], device=rows.device)
        self.ring.index_copy_(2, slots % self.ring.shape[2], rows)

    def pack(self, firsts: Sequence[int] | Tensor) -> None:
        self.first.copy_(torch.as_tensor(firsts))
        rows, self._waiting, self._keeps = self._waiting, None, self.kept > 0
        if rows is None:
            self._pack(self.length)
            return
        block, new = self.codec.block, rows.shape[2]
        for low in range(0, new, block):  # so that none is overwritten before it is packed
            part = rows[:, :, low : low + block]
            self._write(part, self.length - new + low)
            self._pack(self.length - new + low + part.shape[2])

    def _pack(self, length: Tensor) -> None:
        """Pack the next block of each row that is due, now that so many slots are in use; no row has two of them."""
        block, size = self.codec.block, self.ring.shape[2]
        begin = self.first + self.sinks + block * self.count
        due = length - self.keep >= begin + block
        if waits_for_no_device(due) and not bool(due.any()):
            return
        old = taken(self.ring, (begin[:, None] + torch.arange(block, device=due.device)) % size)
        at = self.count.clamp(max=self.blocks[0].shape[2] - 1)
        for held, new in zip(self.blocks, self.codec.pack(old[:, :, None]), strict=True):
            shape = (-1, *[1] * (held.dim() - 1))
            index = at.view(shape).expand(*held.shape[:2], 1, *held.shape[3:])
            held.scatter_(2, index, torch.where(due.view(shape), new, held.gather(2, index)))
        sinks = taken(self.ring, (self.first[:, None] + torch.arange(self.sinks, device=due.device)) % size)
        self.head.copy_(torch.where((due & (self.count == 0))[:, None, None, None], sinks, self.head))
        self.count.add_(due)

    def blocks_of(self, row: int) -> tuple[int, int]:
        """The slot of the first block of a row of the batch, and how many it has."""
        return int(self.first[row]) + self.sinks, int(self.count[row])

    @property
    def held_from(self) -> int:
        """The slot of the first token that may be held as it came."""
        return max(0, int(self.length) - self.ring.shape[2])

    def runs(self, low: int, high: int) -> list[tuple[int, int, int]]:
        return ring_runs(low, high, self.ring.shape[2])

    def _ends(self) -> Tensor:
        """int64[B], the slot from which on each row is held as it came."""
        return torch.where(self.count > 0, self.first + self.sinks + self.codec.block * self.count, self.first)

    @property
    def fixed(self) -> int:
        return int(torch.where(self.count > 0, self._ends(), 0).max())

    def unbroken(self) -> int | None:
        # The first of the tokens to come may complete a block, which all of them see packed.
        length, block = int(self.length) + 1, self.codec.block
        begin = self.first + self.sinks
        counts = torch.maximum(self.count, (length - self.keep - begin) // block)
        return self.keep + int((begin + block * (counts + 1)).min()) - length

    def crop(self, tokens: int) -> None:
        pass  # attention masks what lies past the length

    def take(self, slots: Tensor) -> None:
        raise NotImplementedError("packed blocks drop no tokens")

    # ------------------------------------------------------------ columns

    def _used(self) -> int:
        """How many blocks there are columns for."""
        return int(self.count.max()) if waits_for_no_device(self.count) else self.blocks[0].shape[2]

    def parts(self) -> Iterator[Tensor]:
        yield self.head
        yield from unpacked(self.codec, [each[:, :, : self._used()] for each in self.blocks], self.ring.dtype)
        yield self.ring

    def places(self) -> Places:
        device, size, end = self.ring.device, self.ring.shape[2], self._ends()[:, None]
        first, left = self.first[:, None], self.sinks + self.codec.block * self._used()
        slots, columns, ring = (torch.arange(n, device=device) for n in (self.capacity, left, size))
        column = torch.where(slots >= end, left + slots % size, slots - first).clamp(0, left + size - 1)
        last = self.length - 1
        latest = (last - (last - ring) % size).expand(len(end), -1)  # the last slot that lies there
        slot = torch.cat([columns + first, latest], dim=1)
        filled = torch.cat([columns + first < end, (latest >= end) & (latest >= 0)], dim=1)
        return Places(column, slot.clamp(0, self.capacity - 1), filled)

    # ------------------------------------------------------------ tensors

    def tensors(self) -> list[Tensor]:
        return [self.ring, self.head, *self.blocks, self.first, self.count]

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.ring, self.head, *self.blocks, self.first, self.count = map(change, self.tensors())

    each_row = each
