"""Where a cache layer holds rows as packed integers: blocks that are counted from each row's own first token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grace_opt.compression.codec import Codec
from grace_opt.runtime.buffers import Growing, followed

_BLOCKS = 64  # packed blocks that are unpacked at a time


class Packed:
    """Old tokens as a codec packs them, in its blocks; sinks and the last tokens as they came.

    A row's blocks begin behind its own sinks, wherever padding puts these, so that a row is packed in a batch as it is
    alone. A block is packed once ``keep`` tokens have come after it.

    What is held lies in *columns*: the sinks of the rows that have blocks, then the blocks, then the last tokens as
    they came, from the first slot on that some row has not packed. Without padding a token's column is its slot. With
    padding some columns are empty: a shorter row has fewer blocks, and its last tokens begin later (`places`).

    Args:
        like: [B, H, _, width], of the dtype and device of the rows.
        sinks: how many of a row's first tokens stay as they came.
    """

    def __init__(self, like: Tensor, codec: Codec, sinks: int, keep: int) -> None:
        self.codec, self.sinks, self.keep = codec, sinks, keep
        self.head = like.new_empty(*like.shape[:2], 0, like.shape[3])
        self.last = Growing(like)
        self.blocks: list[Growing] = []  # what the codec packs a block into, [B, H, blocks, ..]
        self.length = 0  # slots
        self._due = 0  # the length at which a block may be due next
        self._firsts, self._counts = [0] * len(like), [0] * len(like)  # of the rows: first token's slot, and blocks
        self._places: Places | None = None  # of this length, once it was asked for
        self._on_device: Tensor | None = None  # the counts, once they were asked for

    # ------------------------------------------------------------ rows in slots

    def reserve(self, end: int | Tensor) -> None:
        self.last.reserve(self.last.length + int(end) - self.length)
        self.length, self._places = int(end), None

    def put(self, rows: Tensor, at: int | Tensor) -> None:
        self.last.put(rows, int(at) - self.held_from)

    def runs(self, low: int, high: int) -> list[tuple[int, int, int]]:
        return [(low, high, low - self.held_from)]

    @property
    def held_from(self) -> int:
        """The slot of the first token that is held as it came in all rows."""
        return self.length - self.last.length

    def pack(self, firsts: Sequence[int]) -> None:
        if self.length < self._due:
            return
        self._firsts, self._places = list(firsts), None
        counts = self._due_counts(self.length)
        self._due = self._next(counts)
        alike: dict[tuple[int, int, int], list[int]] = {}  # rows of one padding are packed together
        for row, each in enumerate(zip(firsts, self._counts, counts, strict=True)):
            alike.setdefault(each, []).append(row)
        for (first, have, count), rows in alike.items():
            if count > have:
                self._pack(slice(None) if len(rows) == len(firsts) else torch.tensor(rows), first, have, count)
        if counts != self._counts:
            self._counts, self._on_device = counts, None
            left, tokens = self.length - min(self._ends()), self.last.tokens
            self.last = Growing(tokens)
            self.last.append(tokens[:, :, tokens.shape[2] - left :])

    def _pack(self, rows: slice | Tensor, first: int, have: int, count: int) -> None:
        """Pack the blocks ``have`` to ``count`` of some rows that begin at the slot ``first``."""
        block, held, tokens = self.codec.block, self.held_from, self.last.tokens
        begin = self._begin(first)
        old = tokens[rows, :, begin + block * have - held : begin + block * count - held]
        new = self.codec.pack(old.reshape(*old.shape[:2], count - have, block, old.shape[3]))
        batch, heads, _, width = tokens.shape
        if not self.blocks:
            self.blocks = [Growing(each[:1].expand(batch, *each.shape[1:])) for each in new]
            self.head = tokens.new_zeros(batch, heads, self.sinks, width)
        for growing, each in zip(self.blocks, new, strict=True):
            growing.put_some(each, have, rows)
        if have == 0:
            self.head = self.head.clone()  # inference mode and autograd forbid writing into what they have seen
            self.head[rows] = tokens[rows, :, first - held : begin - held]

    def blocks_of(self, row: int) -> tuple[int, int]:
        """The slot of the first block of a row of the batch, and how many it has."""
        return self._begin(self._firsts[row]), self._counts[row]

    @property
    def counts(self) -> Tensor:
        """int32[B], on the device: how many blocks each row has."""
        if self._on_device is None:
            self._on_device = torch.tensor(self._counts, dtype=torch.int32, device=self.last.buffer.device)
        return self._on_device

    def _begin(self, first: int) -> int:
        """The slot of the first block of a row that begins at ``first``."""
        return first + self.sinks

    def _due_counts(self, length: int) -> list[int]:
        """How many blocks each row has once ``length`` slots are in use."""
        rows, block = zip(self._firsts, self._counts, strict=True), self.codec.block
        return [max(have, (length - self.keep - self._begin(first)) // block) for first, have in rows]

    def _next(self, counts: Sequence[int]) -> int:
        """The length at which the first of the rows gets one more."""
        rows = zip(self._firsts, counts, strict=True)
        return self.keep + min((self._begin(first) + self.codec.block * (n + 1) for first, n in rows), default=0)

    def _ends(self) -> list[int]:
        """The slot from which on each row is held as it came."""
        rows = zip(self._firsts, self._counts, strict=True)
        return [self._begin(first) + self.codec.block * count if count else first for first, count in rows]

    @property
    def fixed(self) -> int:
        return max((end for end, count in zip(self._ends(), self._counts, strict=True) if count), default=0)

    def unbroken(self) -> int | None:
        # The first of the tokens to come may complete a block, which all of them see packed.
        return self._next(self._due_counts(self.length + 1)) - 1 - self.length

    def crop(self, tokens: int) -> None:
        self.last.crop(self.last.length - (self.length - tokens))
        self.length, self._places = tokens, None

    def take(self, slots: Tensor) -> None:
        raise NotImplementedError("packed blocks drop no tokens")

    # ------------------------------------------------------------ columns

    @property
    def packed_tokens(self) -> int:
        """How many columns are packed."""
        return self.codec.block * self.blocks[0].length if self.blocks else 0

    def held(self) -> list[Tensor]:
        """What the blocks were packed into, [B, H, blocks, ..] each."""
        return [each.tokens for each in self.blocks]

    def parts(self) -> Iterator[Tensor]:
        yield self.head
        yield from unpacked(self.codec, self.held(), self.last.buffer.dtype)
        yield self.last.tokens

    def places(self) -> Places | None:
        if not self.blocks or not any(self._firsts):
            return None
        if self._places is None:
            self._places = self._found()
        return self._places

    def _found(self) -> Places:
        """Each slot's column, and each column's slot."""
        device = self.last.buffer.device
        first, end = (torch.tensor(each, device=device)[:, None] for each in (self._firsts, self._ends()))
        left = self.head.shape[2] + self.packed_tokens  # columns before the last tokens
        after = left + self.last.length - self.length  # of the last tokens, columns less slots
        slots, columns = (torch.arange(n, device=device) for n in (self.length, self.length + after))
        # The sinks and the blocks of a row lie side by side from its first column on.
        column = torch.where(slots >= end, slots + after, slots - first).clamp(min=0)
        slot = torch.where(columns < left, columns + first, columns - after)
        filled = (slot < end) == (columns < left)
        return Places(column, slot.clamp(max=self.length - 1), filled)

    # ------------------------------------------------------------ tensors

    def tensors(self) -> list[Tensor]:
        return [self.last.buffer, self.head, *(each.buffer for each in self.blocks)]

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.head, self._places, self._on_device = change(self.head), None, None
        self.last.each(change)
        for block in self.blocks:
            block.each(change)

    def each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        self.each(change)
        rows = followed(list(zip(self._firsts, self._counts, strict=True)), change, len(self.last.buffer))
        self._firsts, self._counts, self._on_device = [first for first, _ in rows], [count for _, count in rows], None


def unpacked(codec: Codec, held: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Rows [B, H, _, width] of packed blocks [B, H, blocks, ..], some at a time, so that few are unpacked at once."""
    for low in range(0, held[0].shape[2] if held else 0, _BLOCKS):
        yield codec.unpack([each[:, :, low : low + _BLOCKS] for each in held], dtype).flatten(2, 3)


@dataclass(frozen=True, eq=False)
class Places:
    """Where the tokens of a batch lie, if that differs between its rows.

    Attributes:
        column: int64[B, slots]; any, for padding.
        slot: int64[B, columns]; any, for an empty one.
        filled: bool[B, columns], false for an empty one.
    """

    column: Tensor
    slot: Tensor
    filled: Tensor

    def to_slots(self, scores: Tensor) -> Tensor:
        """[B, H, m, slots] of [B, H, m, columns]."""
        return scores.gather(-1, self.column[:, None, None].expand(*scores.shape[:-1], -1))

    def to_columns(self, weights: Tensor) -> Tensor:
        """[B, H, m, columns] of [B, H, m, slots]; zeros in empty ones."""
        found = weights.gather(-1, self.slot[:, None, None].expand(*weights.shape[:-1], -1))
        return found * self.filled[:, None, None]
