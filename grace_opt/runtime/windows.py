"""Where a cache layer holds the residuals of the last tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from grace_opt.runtime.buffers import Growing, fix, frozen


@dataclass(frozen=True, eq=False)
class Span:
    """Where residuals of whole tokens lie: of the last ``count`` slots, those from ``begins`` on are whole, slot t's at
    ``rows[:, :, (t - base) % size]``, rows [B, H, size, e]."""

    rows: Tensor
    base: int
    count: int
    begins: int = 0

    def runs(self, length: int) -> list[tuple[int, int, int]]:
        """Of the whole ones among ``length`` tokens: first slot, last slot + 1, index in ``rows``, for those that lie
        side by side."""
        low = max(self.begins, length - self.count)
        found = ring_runs(low - self.base, length - self.base, self.rows.shape[2])
        return [(start + self.base, end + self.base, index) for start, end, index in found]


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

    def place(self, length: int) -> int:
        """`admit`, and where in the tensor that holds them the residual of the last of ``length`` tokens goes."""

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
        if not residuals.shape[3]:
            return residuals[:, :, :1].expand(-1, -1, min(self.held, self.recent) if new == 1 else before + new, 0)
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
        if not torch.compiler.is_compiling() and frozen(self.rows):
            self.rows = self.rows.clone()

    def admit(self) -> None:
        self.held = min(self.held + 1, self.size)
        self._let_write()

    def span(self, length: int | Tensor) -> Span:
        return Span(self.rows, 0, min(self.held, self.recent))

    def place(self, length: int) -> int:
        self.admit()
        return (length - 1) % self.size

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
        self.rows = Growing(residuals, least=8)
        self.prompt = residuals.shape[2]  # rows of the prompt's tokens
        self.rows.append(residuals)

    def push(self, residuals: Tensor, length: int | Tensor) -> Tensor:
        self.rows.append(residuals)
        return self.seen

    def admit(self) -> None:
        self.rows.reserve(self.rows.length + 1)

    def span(self, length: int | Tensor) -> Span:
        return Span(self.rows.buffer, int(length) - self.rows.length, self.seen.shape[2])

    def place(self, length: int) -> int:
        self.admit()
        return self.rows.length - 1

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

    def place(self, length: int) -> int:
        return length - 1 - self.begins

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


def ring_runs(low: int, high: int, size: int) -> list[tuple[int, int, int]]:
    """First slot, last slot + 1 and index of the slots ``low`` to ``high`` - 1 that lie side by side in a ring."""
    found = []
    while low < high:
        index = low % size
        end = min(high, low + size - index)
        found.append((low, end, index))
        low = end
    return found
