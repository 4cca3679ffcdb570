"""Where a cache layer holds rows, growing or preallocated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from grace_opt.runtime.packed import Places

Row = TypeVar("Row")


class Buffer(Protocol):
    """The rows of tokens, [B, H, T, width]."""

    @property
    def fixed(self) -> int:
        """How many of the first tokens cannot be forgotten, short of all."""

    def reserve(self, end: int | Tensor) -> None:
        """Make room for the tokens up to the slot ``end``, which is the buffer's length now."""

    def put(self, rows: Tensor, at: int | Tensor) -> None:
        """Store rows [B, H, m, width], the first of them at slot ``at``, where there is room."""

    def runs(self, low: int, high: int) -> list[tuple[int, int, int]]:
        """Of slots ``low`` to ``high`` - 1, held as they came: first slot, last slot + 1, index in the first of
        `tensors`, for those that lie side by side."""

    def pack(self, firsts: Any) -> None:
        """Pack what is old enough, ``firsts`` being the slot of each row's first token, on the host or the device."""

    def parts(self) -> Iterator[Tensor]:
        """All rows in order of their columns, [B, H, _, width] at a time, in the dtype that they came in."""

    def places(self) -> Places | None:
        """In which column the token of a slot lies; None: in that of the same number."""

    def crop(self, tokens: int) -> None:
        """Forget all but the first ``tokens``."""

    def take(self, slots: Tensor) -> None:
        """Keep only these slots of each row of the batch, int64[B, S]."""

    def unbroken(self) -> int | None:
        """How many tokens may come in one update as if they came one by one; None: any number."""

    def tensors(self) -> list[Tensor]:
        """Every tensor that is held."""

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor that is held."""

    def each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        """The same, where the rows of the batch become others."""


class Growing:
    """A buffer that grows by 1/128 of its length: at most 0.8 % of it is waste, and an appended token copies about 128
    tokens' worth of it on average, instead of all of it.

    Args:
        like: [B, H, _, ..], of the dtype and device of the rows.
        room: elements that a row takes, if more than its width; the others are zero.
        least: tokens that it grows by at the least.
    """

    fixed = 0

    def __init__(self, like: Tensor, room: int = 0, least: int = 0) -> None:
        self.least = least
        self.width = like.shape[-1]
        self.buffer = like.new_empty(*like.shape[:2], 0, *like.shape[3:-1], max(room, self.width))
        self.length = 0

    def reserve(self, end: int | Tensor) -> None:
        self.buffer, self.length = self._with_room(int(end)), int(end)

    def put(self, rows: Tensor, at: int | Tensor) -> None:
        self.tokens[:, :, at : at + rows.shape[2]] = rows

    def append(self, rows: Tensor) -> None:
        """Store rows [B, H, m, ..] behind the last."""
        at = self.length
        self.reserve(at + rows.shape[2])
        self.put(rows, at)

    def put_some(self, new: Tensor, at: int, rows: slice | Tensor) -> None:
        """Store ``new`` [b, H, m, ..] from slot ``at`` on in b rows of the batch; what was never stored is zero."""
        end = at + new.shape[2]
        grown = max(0, end - self.length)
        self.reserve(max(self.length, end))
        self.tokens[:, :, self.length - grown :] = 0
        self.tokens[rows, :, at:end] = new

    def _with_room(self, end: int) -> Tensor:
        """The buffer, or its copy: for ``end`` tokens, and to be written."""
        held, used = self.buffer, min(self.length, end)
        if end <= held.shape[2] and not (used and frozen(held)):
            return held
        capacity = end + (max(self.least, end // 128) if used else 0)
        fresh = held.new_zeros if held.shape[-1] > self.width else held.new_empty
        grown = fresh(*held.shape[:2], capacity, *held.shape[3:])
        grown[:, :, :used] = held[:, :, :used]
        return grown

    def runs(self, low: int, high: int) -> list[tuple[int, int, int]]:
        return [(low, high, low)]

    def pack(self, firsts: Any) -> None:
        pass

    @property
    def tokens(self) -> Tensor:
        return self.buffer[:, :, : self.length, ..., : self.width]

    def parts(self) -> Iterator[Tensor]:
        yield self.tokens

    def places(self) -> None:
        return None

    def crop(self, tokens: int) -> None:
        self.length = tokens

    def take(self, slots: Tensor) -> None:
        self.buffer = taken(self.buffer, slots)
        self.length = slots.shape[1]

    def unbroken(self) -> int | None:
        return None

    def tensors(self) -> list[Tensor]:
        return [self.buffer]

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.buffer = change(self.buffer)

    each_row = each


class Preallocated:
    """A buffer of fixed size, written in place; slots past the last token hold zeros or what was cropped."""

    fixed = 0

    def __init__(self, like: Tensor, capacity: int, room: int = 0) -> None:
        self.width = like.shape[3]
        self.buffer = like.new_zeros(*like.shape[:2], capacity, max(room, self.width))
        fix(self.buffer)

    @property
    def tokens(self) -> Tensor:
        return self.buffer[..., : self.width]

    def reserve(self, end: int | Tensor) -> None:
        pass

    def put(self, rows: Tensor, at: int | Tensor) -> None:
        positions = at + torch.arange(rows.shape[2], device=rows.device)
        self.tokens.index_copy_(2, positions, rows)

    def runs(self, low: int, high: int) -> list[tuple[int, int, int]]:
        return [(low, high, low)]

    def pack(self, firsts: Any) -> None:
        pass

    def parts(self) -> Iterator[Tensor]:
        yield self.tokens

    def places(self) -> None:
        return None

    def crop(self, tokens: int) -> None:
        pass  # attention masks what lies past the length

    def take(self, slots: Tensor) -> None:
        raise NotImplementedError("a preallocated buffer drops no tokens")

    def unbroken(self) -> int | None:
        return None

    def tensors(self) -> list[Tensor]:
        return [self.buffer]

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.buffer = change(self.buffer)

    each_row = each


def waits_for_no_device(tensor: Tensor) -> bool:
    """Whether the host may look into it at no cost."""
    return not torch.compiler.is_compiling() and not tensor.is_cuda


def taken(rows: Tensor, slots: Tensor) -> Tensor:
    """Of each row of the batch [B, H, T, d] the slots int64[B, S]: [B, H, S, d]."""
    return rows.gather(2, slots[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))


def followed(rows: list[Row], change: Callable[[Tensor], Tensor], count: int) -> list[Row]:
    """What the ``count`` rows of a batch are, once ``change`` has picked them from ``rows``; asks no device if all are
    alike."""
    if len(set(rows)) < 2:
        return rows[:1] * count
    return [rows[i] for i in change(torch.arange(len(rows))).tolist()]


def fix(*tensors: Tensor) -> None:
    """Tell the compiler that these tensors stay where they are, so that CUDA graphs may write into them."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)


def frozen(held: Tensor) -> bool:
    """Whether autograd or inference mode forbid to write into it: then every update copies."""
    return torch.is_grad_enabled() or (held.is_inference() and not torch.is_inference_mode_enabled())
