"""Where a cache layer holds rows, growing or preallocated, and the residuals of the last tokens.

Over 400 lines: a buffer and a window are two protocols with several forms each, which are read side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from grace_opt.runtime.packed import Places

Row = TypeVar("Row")


class Buffer(Protocol):
    """The rows of tokens, [B, H, T, width]."""

    @property
    def tokens(self) -> Tensor:
        """[B, H, _, width]: those that are held as they came, in order."""

    @property
    def fixed(self) -> int:
        """How many of the first tokens cannot be forgotten, short of all."""

    def reserve(self, end: int | Tensor) -> None:
        """Make room for the tokens up to the slot ``end``, which is the buffer's length now."""

    def put(self, rows: Tensor, at: int | Tensor) -> None:
        """Store rows [B, H, m, width], the first of them at slot ``at``, where there is room."""

    def pack(self, firsts: Sequence[int]) -> None:
        """Pack what is old enough, ``firsts`` being the slot of each row's first token."""

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
    """

    fixed = 0

    def __init__(self, like: Tensor, room: int = 0) -> None:
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
        if end <= held.shape[2] and not (used and _frozen(held)):
            return held
        capacity = end + (end // 128 if used else 0)
        fresh = held.new_zeros if held.shape[-1] > self.width else held.new_empty
        grown = fresh(*held.shape[:2], capacity, *held.shape[3:])
        grown[:, :, :used] = held[:, :, :used]
        return grown

    def pack(self, firsts: Sequence[int]) -> None:
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

    def pack(self, firsts: Sequence[int]) -> None:
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


@dataclass(frozen=True, eq=False)
class Span:
    """Where residuals of whole tokens lie: of the last ``count`` slots, those from ``begins`` on are whole, slot t's at
    ``rows[:, :, (t - base) % size]``, rows [B, H, size, e]."""

    rows: Tensor
    base: int
    count: int
    begins: int = 0


class Window(Protocol):
    """The residuals of the last tokens."""

    def push(self, residuals: Tensor, length: int | Tensor) -> Tensor:
        """Take those of tokens that just came, ``length`` tokens with them; returns what their queries may see whole,
        [B, H, _, e], up to the last token, or in a preallocated cache that keeps generated tokens from its first slot
        on."""

    def admit(self) -> None:
        """Make room for the residual of one token that just came, which a kernel stores."""

    def span(self, length: int | Tensor) -> Span:
        """Where the residuals of the tokens lie that the last of ``length`` may see whole."""

    def place(self, length: int) -> Tensor:
        """[B, H, e], where the residual of the last of ``length`` tokens goes, which just came."""

    def runs(self, length: int) -> list[tuple[int, int, int]]:
        """Of the tokens that the last query may see whole: first slot, last slot + 1, index in the tensor that holds
        them, for those that lie side by side."""

    def crop(self, count: int, length: int) -> None:
        """Forget the last ``count`` tokens, all but ``length``."""

    def tensors(self) -> list[Tensor]:
        """Every tensor that is held."""

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor that is held."""


class Ring:
    """Of the last ``recent`` tokens, and of ``spare`` more, so that as many can be taken back; written in place.

    The residual of slot t lies at t modulo the ring's size.

    Args:
        residuals: [B, H, m, e], of the last tokens, no more than the ring holds.
        length: how many tokens there are.
        fixed: of a preallocated cache: it is full from the start, with zeros before the first token.
    """

    def __init__(self, residuals: Tensor, length: int, recent: int, spare: int, fixed: bool = False) -> None:
        count = residuals.shape[2]
        self.recent, self.size, self.fixed = recent, recent + spare, fixed
        self.held = self.size if fixed else count  # tokens
        self.rows = residuals.new_zeros(*residuals.shape[:2], self.size, residuals.shape[3])
        if count:
            self.rows[:, :, self._at(length - count, count)] = residuals
        if fixed:
            fix(self.rows)

    def _at(self, slot: int | Tensor, count: int) -> Tensor:
        return (slot + torch.arange(count, device=self.rows.device)) % self.size

    def push(self, residuals: Tensor, length: int | Tensor) -> Tensor:
        new, before = residuals.shape[2], self.held
        if not self.size:  # nothing is held, but what came together is seen whole
            return residuals[:, :, : 0 if new == 1 else new]
        self.held = min(before + new, self.size)
        if new == 1:
            self._write(residuals, length)
            count = min(self.held, self.recent)
            return self.rows.index_select(2, self._at(length - count, count))
        old = self.rows.index_select(2, self._at(length - new - before, before))
        self._write(residuals[:, :, -self.size :], length)
        return torch.cat([old, residuals], dim=2)

    def _write(self, residuals: Tensor, length: int | Tensor) -> None:
        self._let_write()
        count = residuals.shape[2]
        self.rows.index_copy_(2, self._at(length - count, count), residuals)

    def _let_write(self) -> None:
        if not torch.compiler.is_compiling() and _frozen(self.rows):
            self.rows = self.rows.clone()

    def admit(self) -> None:
        self.held = min(self.held + 1, self.size)
        self._let_write()

    def span(self, length: int | Tensor) -> Span:
        return Span(self.rows, 0, min(self.held, self.recent))

    def place(self, length: int) -> Tensor:
        self.admit()
        return self.rows[:, :, (length - 1) % self.size]

    def runs(self, length: int) -> list[tuple[int, int, int]]:
        begin, found = max(0, length - min(self.held, self.recent)), []
        while begin < length:
            index = begin % self.size
            end = min(length, begin + self.size - index)
            found.append((begin, end, index))
            begin = end
        return found

    def shift(self, count: int) -> None:
        """The number of each slot becomes smaller by ``count``."""
        self.rows = self.rows.roll(-count, dims=2)

    def crop(self, count: int, length: int) -> None:
        self.held -= 0 if self.fixed else min(count, self.held)

    def tensors(self) -> list[Tensor]:
        return [self.rows]

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.rows = change(self.rows)


class Kept:
    """Of the last ``recent`` tokens of the prompt and of all tokens after it, and of ``spare`` more before them."""

    def __init__(self, residuals: Tensor, recent: int) -> None:
        self.recent = recent
        self.rows, self.prompt = Growing(residuals), residuals.shape[2]  # rows of the prompt's tokens
        self.rows.append(residuals)

    def push(self, residuals: Tensor, length: int | Tensor) -> Tensor:
        self.rows.append(residuals)
        return self.seen

    def admit(self) -> None:
        self.rows.reserve(self.rows.length + 1)

    def span(self, length: int | Tensor) -> Span:
        return Span(self.rows.buffer, int(length) - self.rows.length, self.seen.shape[2])

    def place(self, length: int) -> Tensor:
        self.admit()
        return self.rows.tokens[:, :, -1]

    def runs(self, length: int) -> list[tuple[int, int, int]]:
        return [(length - self.seen.shape[2], length, self.rows.length - self.seen.shape[2])]

    @property
    def seen(self) -> Tensor:
        """What the last query may see whole."""
        return self.rows.tokens[:, :, max(0, self.prompt - self.recent) :]

    def crop(self, count: int, length: int) -> None:
        self.rows.crop(max(0, self.rows.length - count))
        self.prompt = min(self.prompt, self.rows.length)

    def tensors(self) -> list[Tensor]:
        return self.rows.tensors()

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.rows.each(change)


class FixedKept:
    """`Kept` in place: from slot ``begins`` to the end of the cache; what lies past the last token is never seen."""

    def __init__(self, residuals: Tensor, length: int, recent: int, capacity: int) -> None:
        self.recent, self.prompt = recent, residuals.shape[2]  # rows of the prompt's tokens
        self.begins = length - self.prompt
        self.rows = residuals.new_zeros(*residuals.shape[:2], capacity - self.begins, residuals.shape[3])
        self.rows[:, :, : self.prompt] = residuals
        fix(self.rows)

    def push(self, residuals: Tensor, length: int | Tensor) -> Tensor:
        at = length - residuals.shape[2] - self.begins + torch.arange(residuals.shape[2], device=residuals.device)
        self.rows.index_copy_(2, at, residuals)
        return self.seen

    def admit(self) -> None:
        pass

    def span(self, length: int | Tensor) -> Span:
        seen = self.seen.shape[2]
        return Span(self.rows, self.begins, self.begins + self.rows.shape[2], self.begins + self.rows.shape[2] - seen)

    def place(self, length: int) -> Tensor:
        return self.rows[:, :, length - 1 - self.begins]

    def runs(self, length: int) -> list[tuple[int, int, int]]:
        index = self.rows.shape[2] - self.seen.shape[2]
        return [(self.begins + index, length, index)]

    @property
    def seen(self) -> Tensor:
        """What the last query may see whole, and what is yet to come."""
        return self.rows[:, :, max(0, self.prompt - self.recent) :]

    def crop(self, count: int, length: int) -> None:
        self.prompt = max(0, min(self.prompt, length - self.begins))

    def tensors(self) -> list[Tensor]:
        return [self.rows]

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.rows = change(self.rows)


def room_of(width: int, dtype: torch.dtype) -> int:
    """Elements that a row of this width takes: in 16 bits it begins at a multiple of 16 bytes, as cards load them."""
    return -(-width // 8) * 8 if dtype.itemsize == 2 else width


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


def _frozen(held: Tensor) -> bool:
    """Whether autograd or inference mode forbid to write into it: then every update copies."""
    return torch.is_grad_enabled() or (held.is_inference() and not torch.is_inference_mode_enabled())
