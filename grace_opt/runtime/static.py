"""A preallocated compressed cache layer, for torch.compile and CUDA graphs: no shape or address ever changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grace_opt.compression.codec import Codec
from grace_opt.compression.pays import room_of
from grace_opt.compression.plan import LayerPlan
from grace_opt.errors import InputError
from grace_opt.heads import Kind
from grace_opt.runtime.buffers import Buffer, Preallocated, fix, waits_for_no_device
from grace_opt.runtime.fixed_packed import FixedPacked
from grace_opt.runtime.handle import Handle
from grace_opt.runtime.layer import PrunedLayer
from grace_opt.runtime.prompt import Rows
from grace_opt.runtime.side import Side
from grace_opt.runtime.slots import first_seen, refuse_right_padding
from grace_opt.runtime.windows import FixedKept, Ring, Window


class StaticPrunedLayer(PrunedLayer):  # type: ignore[no-untyped-call]
    """A `PrunedLayer` of at most ``max_length`` tokens; its length is a tensor, its buffers are written in place.

    A decoded token is one graph without breaks, and nothing waits for the device. Prompts are not meant to be compiled.
    """

    is_compileable = True
    is_static = True
    length: Tensor  # type: ignore[assignment]

    def __init__(self, plan: LayerPlan, max_length: int) -> None:
        self.max_length = max_length
        super().__init__(plan)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.recent_window, self.sink_count = (min(each, self.max_length) for each in (self.recent_window, self.sinks))
        self.length = torch.tensor(0)
        self._empty = True
        self._longest = 0  # what the length was before tokens were taken back

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """As of `PrunedLayer`."""
        super().lazy_initialization(key_states, value_states)
        self.length = self.length.to(self.device)
        fix(self.length, self.first)

    def _buffer(self, like: Tensor, codec: Codec) -> Buffer:
        if codec.block:
            kept = self.max_length - self.prompt_length if self.keeps else 0
            keep = self.recent_window + self.spare
            return FixedPacked(like, codec, self.sinks, keep, self.max_length, kept, self.first, self.length)
        return Preallocated(like, self.max_length, room_of(codec.width, like.dtype.itemsize))

    def _window(self, residuals: Tensor, length: int) -> Window:
        if self.keeps:
            return FixedKept(residuals, length, self.recent_window, self.max_length)
        return Ring(residuals, length, self.recent_window, self.spare, fixed=True)

    def _side(self, kind: Kind, states: Tensor, codec: Codec) -> Side:
        side = super()._side(kind, states, codec)
        fix(side.whole, *side.codec.tensors().values())
        return side

    @property
    def columns(self) -> int:
        """For how many slots scores are computed."""
        return self.max_length

    def _grow(self, new: int) -> None:
        if waits_for_no_device(self.length):
            after = int(self.length) + new
            if after > self.max_length:
                raise InputError(
                    f"this static cache holds {self.max_length} tokens and was given {after}; make it with a larger "
                    "max_length"
                )
        else:
            full = "the static cache is full; make it with a larger max_length"
            torch._assert_async(self.length <= self.max_length - new, full)
        self.length.add_(new)

    def _is_prompt(self, new: int) -> bool:
        empty, self._empty = self._empty, False
        return empty

    def window_start(self, count: Any) -> Any:
        """The slot of the first of the window's residuals that new queries may see."""
        return self.max_length - count if self.keeps else self.length - count

    def follow(self, handle: Handle, mask: Tensor | None) -> None:
        """Store the sinks among the tokens that just came."""
        if handle.new > 1 and not torch.compiler.is_compiling():
            refuse_right_padding(mask, int(self.length))
        if self._firsts_missing:
            self._find_first(mask, self.max_length)
            self._put_residuals(handle.residuals, self.length - handle.new, handle.new)
        if self.key_side.turn is not None:
            handle.store()
        if not self.keeps:
            self._pack()

    def _pack(self) -> None:
        for side in self.sides:
            side.buffer.pack(self.first)

    def _store(self, states: tuple[Tensor, Tensor], rows: Rows) -> None:
        super()._store(states, rows)
        self._note_firsts()

    def _note_firsts(self) -> None:
        """Known on the host: where first tokens and sinks have all come with the prompt, no step looks for them."""
        needed = max(self.sink_count, int(any(side.codec.block or side.turn is not None for side in self.sides)))
        self._firsts_missing = needed > 0 and int(self.first.max()) + needed > self.prompt_length

    def _find_first(self, mask: Tensor | None, length: int) -> None:
        if mask is not None:
            self.first.copy_(first_seen(mask, length).expand(self.batch))

    def _put(self, side: Side, residuals: Tensor, slot: Tensor, new: int) -> None:
        arrived = ((slot >= 0) & (slot < new))[:, None, :, None]
        side.whole.copy_(torch.where(arrived, residuals, side.whole))

    def _crop(self, count: int) -> None:
        self._longest = max(self._longest, int(self.length))
        self.length.sub_(count)
        self.prompt_length = min(self.prompt_length, int(self.length))
        self._note_firsts()
        for side in self.sides:
            side.window.crop(count, int(self.length))

    def _oldest(self) -> int:
        if self.keeps:
            return self._kept_from()
        return max(0, max(self._longest, int(self.length)) - self.recent_window - self.spare)

    def get_seq_length(self) -> Any:
        """How many tokens have come, as a tensor: transformers makes positions of it."""
        return self.length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(length, offset) of the keys that a mask must cover: all that may come."""
        return self.max_length, 0

    def get_max_length(self) -> int:
        """How many tokens it holds."""
        return self.max_length

    get_max_cache_shape = get_max_length
