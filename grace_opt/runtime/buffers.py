"""Where a cache layer holds rows, growing or preallocated, and the residuals of the last tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

    def append(self, rows: Tensor, at: int | Tensor) -> None:
        """Store rows [B, H, m, width], the first of them at slot ``at``."""

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
    """

    fixed = 0

    def __init__(self, like: Tensor) -> None:
        self.buffer = like.new_empty(*like.shape[:2], 0, *like.shape[3:])
        self.length = 0

    def append(self, rows: Tensor, at: int | Tensor) -> None:
        self.buffer = _written(self.buffer, int(at), rows, int(at))
        self.length = int(at) + rows.shape[2]

    def put(self, new: Tensor, at: int, rows: slice | Tensor) -> None:
        """Store ``new`` [b, H, m, ..] from slot ``at`` on in b rows of the batch; what was never stored is zero."""
        self.buffer = _written(self.buffer, self.length, new, at, rows)
        self.length = max(self.length, at + new.shape[2])

    def pack(self, firsts: Sequence[int]) -> None:
        pass

    @property
    def tokens(self) -> Tensor:
        return self.buffer[:, :, : self.length]

    def parts(self) -> Iterator[Tensor]:
        yield self.tokens

    def places(self) -> None:
        return None

    def crop(self, tokens: int) -> None:
        self.length = tokens

    def take(self, slots: Tensor) -> None:
        self.buffer = taken(self.tokens, slots)
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

    def __init__(self, like: Tensor, capacity: int) -> None:
        self.tokens = like.new_zeros(*like.shape[:2], capacity, like.shape[3])
        fix(self.tokens)

    def append(self, rows: Tensor, at: int | Tensor) -> None:
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
        return [self.tokens]

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.tokens = change(self.tokens)

    each_row = each


class Window(Protocol):
    """The residuals of the last tokens."""

    def push(self, residuals: Tensor, length: int | Tensor) -> Tensor:
        """Take those of tokens that just came, ``length`` tokens with them; returns what their queries may see whole,
        [B, H, _, e], up to the last token, or for a fixed one from its first slot on."""

    def crop(self, count: int, length: int) -> None:
        """Forget the last ``count`` tokens, all but ``length``."""

    def tensors(self) -> list[Tensor]:
        """Every tensor that is held."""

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor that is held."""


class Sliding:
    """Of the last ``recent`` tokens, and of ``spare`` more, so that as many can be taken back."""

    def __init__(self, residuals: Tensor, recent: int, spare: int) -> None:
        self.recent, self.limit = recent, recent + spare
        # A view would hold on to the whole prompt's residuals.
        self.rows = residuals[:, :, max(0, residuals.shape[2] - self.limit) :].clone()

    def push(self, residuals: Tensor, length: int | Tensor) -> Tensor:
        span = torch.cat([self.rows, residuals], dim=2)
        kept = span[:, :, max(0, span.shape[2] - self.limit) :]
        self.rows = kept if kept.shape[2] == span.shape[2] else kept.clone()
        return span[:, :, span.shape[2] - min(span.shape[2], self.recent) :] if residuals.shape[2] == 1 else span

    def crop(self, count: int, length: int) -> None:
        self.rows = self.rows[:, :, : max(0, self.rows.shape[2] - count)].clone()

    def tensors(self) -> list[Tensor]:
        return [self.rows]

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.rows = change(self.rows)


class Kept:
    """Of the last ``recent`` tokens of the prompt and of all tokens after it, and of ``spare`` more before them."""

    def __init__(self, residuals: Tensor, recent: int, spare: int) -> None:
        self.recent = recent
        first = residuals[:, :, max(0, residuals.shape[2] - recent - spare) :]
        self.rows, self.prompt = Growing(first), first.shape[2]  # rows of the prompt's tokens
        self.rows.append(first, 0)

    def push(self, residuals: Tensor, length: int | Tensor) -> Tensor:
        self.rows.append(residuals, self.rows.length)
        return self.rows.tokens[:, :, max(0, self.prompt - self.recent) :]

    def crop(self, count: int, length: int) -> None:
        self.rows.crop(max(0, self.rows.length - count))
        self.prompt = min(self.prompt, self.rows.length)

    def tensors(self) -> list[Tensor]:
        return self.rows.tensors()

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.rows.each(change)


class FixedSliding:
    """`Sliding` in place; it is full from the start, with zeros before the first token."""

    def __init__(self, residuals: Tensor, recent: int, spare: int) -> None:
        self.recent = recent
        self.rows = residuals.new_zeros(*residuals.shape[:2], recent + spare, residuals.shape[3])
        count = min(residuals.shape[2], recent + spare)
        if count:
            self.rows[:, :, -count:] = residuals[:, :, residuals.shape[2] - count :]
        fix(self.rows)

    def push(self, residuals: Tensor, length: int | Tensor) -> Tensor:
        span = torch.cat([self.rows, residuals], dim=2)
        self.rows.copy_(span[:, :, residuals.shape[2] :])
        return span[:, :, span.shape[2] - self.recent :] if residuals.shape[2] == 1 else span

    def crop(self, count: int, length: int) -> None:
        self.rows.copy_(self.rows.roll(count, dims=2))  # the layer knows that the first are none now

    def tensors(self) -> list[Tensor]:
        return [self.rows]

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.rows = change(self.rows)


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
        return self.rows[:, :, max(0, self.prompt - self.recent) :]

    def crop(self, count: int, length: int) -> None:
        self.prompt = max(0, min(self.prompt, length - self.begins))

    def tensors(self) -> list[Tensor]:
        return [self.rows]

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.rows = change(self.rows)


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


def _written(buffer: Tensor, length: int, new: Tensor, at: int, rows: slice | Tensor | None = None) -> Tensor:
    """``buffer`` [B, H, capacity, ..], ``length`` of it in use, with ``new`` [B, H, n, ..] written from ``at`` on.

    It grows if it must. With ``rows`` only these are written, and what was never written is zero.
    """
    end = max(length, at + new.shape[2])
    # Autograd and inference mode forbid writing into what they have seen: then every update copies.
    frozen = torch.is_grad_enabled() or (buffer.is_inference() and not torch.is_inference_mode_enabled())
    if end > buffer.shape[2] or (frozen and length):
        capacity = end if length == 0 else end + end // 128
        fresh = buffer.new_empty if rows is None else buffer.new_zeros
        grown = fresh(*buffer.shape[:2], capacity, *buffer.shape[3:])
        grown[:, :, :length] = buffer[:, :, :length]
        buffer = grown
    buffer[slice(None) if rows is None else rows, :, at : at + new.shape[2]] = new
    return buffer
