"""The keys or the values of one cache layer: rows of all tokens, residuals of the whole ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from grace_opt.compression.codec import Codec, Whole
from grace_opt.compression.integers import Integers
from grace_opt.models.rotary import Table
from grace_opt.runtime.buffers import Buffer
from grace_opt.runtime.windows import Window

REBUILT = 512  # keys that are rebuilt at a time
Positions = Callable[[Tensor], Tensor]  # of slots int64[.., m], int64[1 or B, m]


class Coding:
    """How keys or values are stored and read.

    Args:
        codec: of all heads together, its tensors [1 or B, H, ..], or [1 or B, 1, ..] where these share rows.
        turn: of keys that are stored before RoPE: how it turns them. Their positions int64[1 or B, m] go with them.
    """

    def __init__(self, codec: Codec, turn: Table | None = None) -> None:
        self.codec, self.turn = codec, turn

    def encode(self, states: Tensor, positions: Tensor) -> Tensor:
        """Rows of tokens [B, H, m, n]."""
        return self.codec.encode(states if self.turn is None else self.turn.back(states, positions))

    def residual(self, states: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """What whole ones of these tokens hold beside their rows, [B, H, m, e]."""
        if self.turn is None:
            return self.codec.residual(states, rows)
        return states - self.rebuilt(rows, positions)

    def asked(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, H, m, n] as they meet rows, or keys rebuilt of these, and residuals."""
        return self.codec.asked(query) if self.turn is None else (query, query)

    def rebuilt(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Keys [B, H, m, n] as attention meets them, of rows before RoPE."""
        assert self.turn is not None
        return self.turn.forth(self.codec.read(rows, None), positions)


class Side(Coding):
    """Keys or values of B rows and H KV heads, stored by codecs of one signature.

    Args:
        coding: how.
        buffer: holds the rows.
        window: holds the residuals of the last tokens.
        whole: [B, H, K, e], residuals of the whole tokens outside the window: first the sinks (zeros for those that
            have not come yet), then those that a token policy keeps whole.
    """

    def __init__(self, coding: Coding, buffer: Buffer, window: Window, whole: Tensor) -> None:
        super().__init__(coding.codec, coding.turn)
        self.buffer, self.window, self.whole = buffer, window, whole

    @property
    def bits(self) -> int:
        """Of packed integers; 0 where rows are held as they are."""
        return self.codec.bits if isinstance(self.codec, Integers) else 0

    @property
    def exact(self) -> bool:
        """Whether tokens are held as they come."""
        return isinstance(self.codec, Whole)

    def put(self, states: Tensor, at: int | Tensor, position: Positions) -> Tensor:
        """Store tokens [B, H, m, n] from slot ``at`` on, for which there is room; returns their residuals."""
        slots = at + torch.arange(states.shape[2], device=states.device)
        positions = slots if self.turn is None else position(slots)
        rows = self.encode(states, positions)
        self.buffer.put(rows, at)
        return self.residual(states, rows, positions)

    def make_room(self, sinks: int, room: int) -> None:
        """Hold the residuals of ``room`` sinks of each row, not of ``sinks``."""
        more = self.whole.new_zeros(*self.whole.shape[:2], room - sinks, self.whole.shape[3])
        self.whole = torch.cat([self.whole[:, :, :sinks], more, self.whole[:, :, sinks:]], dim=2)

    def scores(self, asked: Tensor, position: Positions) -> Tensor:
        """Products [B, H, m, T] of asked queries [B, H, m, ..] with the rows of all tokens, or with what is rebuilt."""
        met = self.buffer.parts() if self.turn is None else self._rebuilt(position)
        parts = []
        for part in met:
            each = _shared(asked, part) @ part.mT
            parts.append(each.reshape(*asked.shape[:3], part.shape[2]))
        found, places = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1), self.buffer.places()
        return found if places is None else places.to_slots(found)

    def _rebuilt(self, position: Positions) -> Iterator[Tensor]:
        """The keys of all columns [B, H, _, n], some at a time."""
        begin, places = 0, self.buffer.places()
        for part in self.buffer.parts():
            for low in range(0, part.shape[2], REBUILT):
                rows = part[:, :, low : low + REBUILT]
                end = begin + rows.shape[2]
                slots = torch.arange(begin, end, device=rows.device) if places is None else places.slot[:, begin:end]
                yield self.rebuilt(rows, position(slots))
                begin = end

    def mixed(self, weights: Tensor) -> Tensor:
        """Sums [B, H, m, width] of the rows of all tokens with weights [B, H, m, T]."""
        total, low, places = None, 0, self.buffer.places()
        shape = weights.shape[:3]
        weights = weights if places is None else places.to_columns(weights)
        for part in self.buffer.parts():
            each = _shared(weights[..., low : low + part.shape[2]], part) @ part
            total = each if total is None else total + each
            low += part.shape[2]
        assert total is not None
        return total.reshape(*shape, -1)

    def tensors(self) -> list[Tensor]:
        """Every tensor that is held."""
        return [*self.codec.tensors().values(), *self.buffer.tensors(), *self.window.tensors(), self.whole]

    def each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor that has a row for each prompt."""
        self.buffer.each_row(change)
        self.window.each(change)
        self.whole = change(self.whole)
        self.codec = self.codec.mapped(lambda tensor: change(tensor) if tensor.shape[0] > 1 else tensor)

    def move(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by one on another device."""
        self.buffer.each(change)
        self.window.each(change)
        self.whole = change(self.whole)
        self.codec = self.codec.mapped(change)


def _shared(by_head: Tensor, rows: Tensor) -> Tensor:
    """What is by head [B, H, m, ..], as it multiplies rows [B, H or 1, ..]: where these are shared, as of one head."""
    return by_head if rows.shape[1] == by_head.shape[1] else by_head.flatten(1, 2).unsqueeze(1)
