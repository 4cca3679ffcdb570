"""The keys or the values of one cache layer: rows of all tokens, residuals of the whole ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grace_opt.compression.codec import Codec, Whole
from grace_opt.compression.integers import Integers
from grace_opt.runtime.buffers import Buffer
from grace_opt.runtime.windows import Window


class Side:
    """Keys or values of B rows and H KV heads, stored by codecs of one signature.

    Args:
        codec: of all heads together, its tensors [1 or B, H, ..].
        buffer: holds the rows.
        window: holds the residuals of the last tokens.
        whole: [B, H, K, e], residuals of the whole tokens outside the window: first the sinks (zeros for those that
            have not come yet), then those that a token policy keeps whole.
    """

    def __init__(self, codec: Codec, buffer: Buffer, window: Window, whole: Tensor) -> None:
        self.codec, self.buffer, self.window, self.whole = codec, buffer, window, whole

    @property
    def bits(self) -> int:
        """Of packed integers; 0 where rows are held as they are."""
        return self.codec.bits if isinstance(self.codec, Integers) else 0

    @property
    def exact(self) -> bool:
        """Whether tokens are held as they come."""
        return isinstance(self.codec, Whole)

    def put(self, states: Tensor, at: int | Tensor) -> Tensor:
        """Store tokens [B, H, m, n] from slot ``at`` on, for which there is room; returns their residuals."""
        rows = self.codec.encode(states)
        self.buffer.put(rows, at)
        return self.codec.residual(states, rows)

    def make_room(self, sinks: int, room: int) -> None:
        """Hold the residuals of ``room`` sinks of each row, not of ``sinks``."""
        more = self.whole.new_zeros(*self.whole.shape[:2], room - sinks, self.whole.shape[3])
        self.whole = torch.cat([self.whole[:, :, :sinks], more, self.whole[:, :, sinks:]], dim=2)

    def scores(self, asked: Tensor) -> Tensor:
        """Products [B, H, m, T] of asked queries [B, H, m, width] with the rows of all tokens."""
        parts = [asked @ part.mT for part in self.buffer.parts()]
        found, places = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1), self.buffer.places()
        return found if places is None else places.to_slots(found)

    def mixed(self, weights: Tensor) -> Tensor:
        """Sums [B, H, m, width] of the rows of all tokens with weights [B, H, m, T]."""
        total, low, places = None, 0, self.buffer.places()
        weights = weights if places is None else places.to_columns(weights)
        for part in self.buffer.parts():
            each = weights[..., low : low + part.shape[2]] @ part
            total = each if total is None else total + each
            low += part.shape[2]
        assert total is not None
        return total

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
