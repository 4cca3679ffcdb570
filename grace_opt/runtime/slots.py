"""Where tokens lie in the buffers of a layer that drops some of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grace_opt.errors import InputError
from grace_opt.runtime.prompt import Staying


class Slots:
    """A layer's slots, on the right of its buffers where rows have different numbers of tokens.

    Args:
        stay: which of the prompt's tokens stay.
        tokens: how many the prompt has.
        apart: whether whole tokens hold more than others.

    Attributes:
        positions: int64[B, slots], of the tokens; -1 for none.
        extra: int64[B, K], slots of whole tokens beside sinks and window, -1 for none; None if there are none.
        dropped: tokens that have come and have no slot.
        reach: int64[B], how many of the last tokens stay as more come, if the policy lets them slide; None: all.
    """

    def __init__(self, stay: Staying, tokens: int, apart: bool) -> None:
        self.positions, self.dropped = stay.slots, tokens - stay.slots.shape[1]
        self.extra = stay.whole if stay.whole.shape[1] and apart else None
        self.reach: Tensor | None = None
        self._gaps = bool((self.positions < 0).any())  # whether rows have different numbers of tokens

    @property
    def first(self) -> Tensor:
        """int64[B]: the slot of each row's first token."""
        return (self.positions < 0).sum(1)

    def grow(self, new: int, seen: int) -> None:
        """Tokens have come, ``seen`` with them."""
        more = torch.arange(seen - new, seen, device=self.positions.device).expand(len(self.positions), -1)
        self.positions = torch.cat([self.positions, more], dim=1)

    def mask(self, mask: Tensor | None, causal: Callable[[], Tensor]) -> Tensor | None:
        """A mask of slots [B, 1, n, slots] from one of positions [B or 1, 1, n, T]."""
        if mask is None and not self._gaps:
            return None
        there = (self.positions >= 0)[:, None, None]
        if mask is None:
            return there & causal()
        rows = self.positions.clamp(min=0)[:, None, None].expand(-1, 1, mask.shape[2], -1)
        mask = mask.expand(len(self.positions), -1, -1, -1).gather(3, rows)
        return mask & there if mask.dtype == torch.bool else mask.masked_fill(~there, torch.finfo(mask.dtype).min)

    def slide(self, first: Tensor, sinks: int, new: int) -> Tensor | None:
        """Drop what is out of reach for all of the ``new`` tokens; int64[B, slots] of those that stay, or None if all.

        -1 where a row has fewer. ``first`` int64[B]: the slot of each row's first token.
        """
        if self.reach is None:
            return None
        length = self.positions.shape[1]
        slots = torch.arange(length, device=self.positions.device).expand(len(self.positions), -1)
        is_sink = (slots >= first[:, None]) & (slots < first[:, None] + sinks)
        stay = (is_sink | (slots >= length - self.reach[:, None] - new + 1)) & (self.positions >= 0)
        size = int(stay.sum(1).max())
        if size == length:
            return None
        left = torch.where(stay, slots, -1).sort(dim=1).values[:, length - size :].contiguous()
        self.positions = torch.where(left >= 0, self.positions.gather(1, left.clamp(min=0)), -1)
        if self.extra is not None:
            at = torch.searchsorted(left, self.extra).clamp(max=size - 1)
            self.extra = torch.where((left.gather(1, at) == self.extra) & (self.extra >= 0), at, -1)
        self.dropped += length - size
        self._gaps = bool((left < 0).any())
        return left

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` slots."""
        self.positions = self.positions[:, :length]

    def tensors(self) -> list[Tensor]:
        """Every tensor that is held."""
        return [each for each in (self.positions, self.extra, self.reach) if each is not None]

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor."""
        self.positions = change(self.positions)
        self.extra = None if self.extra is None else change(self.extra)
        self.reach = None if self.reach is None else change(self.reach)


def first_seen(mask: Tensor, length: int) -> Tensor:
    """int64[B or 1]: the first slot that each row's last query may see, under a mask [B or 1, 1, n, T]; if there is
    none, ``length``.
    """
    seen = _seen(mask, length)
    return torch.where(seen.any(1), seen.int().argmax(1), length)


def refuse_right_padding(mask: Tensor | None, length: int) -> None:
    """The last tokens of a row are its recent window: they must be real."""
    if mask is not None:
        seen = _seen(mask, length)
        if bool((seen.any(1) & ~seen[:, -1]).any()):
            raise InputError("a row of the batch is padded on the right; pad prompts on the left")


def _seen(mask: Tensor, length: int) -> Tensor:
    row = mask[:, 0, -1, :length]
    return row if row.dtype == torch.bool else row > -1e3  # masks go by -1e4 and lower
