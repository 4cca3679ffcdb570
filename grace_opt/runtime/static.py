"""A preallocated channel-pruned cache layer, for torch.compile and CUDA graphs: no shape or address ever changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grace_opt.errors import InputError
from grace_opt.heads import Kind
from grace_opt.runtime.attention import Pruned
from grace_opt.runtime.buffers import Preallocated, Store
from grace_opt.runtime.layer import PrunedLayer, first_seen, refuse_right_padding
from grace_opt.runtime.plan import LayerPlan
from grace_opt.runtime.side import Channels


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
        self.length = torch.tensor(0)
        self._empty = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """As of `PrunedLayer`; allocates everything."""
        super().lazy_initialization(key_states, value_states)
        self.length = self.length.to(self.device)
        rows = self.recent_window + self.spare
        for held in self.held:
            held.window = held.window.new_zeros(*held.window.shape[:2], rows, held.window.shape[3])
            _fix(held.window, held.sinks)
        self._oldest = torch.full_like(self.length, -rows)  # the position of the oldest token with a row
        _fix(self.length, self.first, self._oldest)

    def _store(self, kind: Kind, like: Tensor) -> Store:
        return Preallocated(like, self.max_length)

    @property
    def columns(self) -> int:
        """For how many tokens scores are computed."""
        return self.max_length

    def _grow(self, new: int) -> None:
        if not torch.compiler.is_compiling() and not self.length.is_cuda:
            after = int(self.length) + new
            if after > self.max_length:
                raise InputError(
                    f"this static cache holds {self.max_length} tokens and was given {after}; make it with a larger "
                    "max_length"
                )
        else:
            fits = self.length + new <= self.max_length
            torch._assert_async(fits, "the static cache is full; make it with a larger max_length")
        self.length.add_(new)
        self._oldest.copy_(torch.maximum(self._oldest, self.length - self.recent_window - self.spare))

    def _is_prompt(self, before: Any) -> bool:
        empty, self._empty = self._empty, False
        return empty

    def _shift(self, held: Channels, rows: Tensor) -> Tensor:
        span = torch.cat([held.window, rows], dim=2)
        held.window.copy_(span[:, :, rows.shape[2] :])
        return span[:, :, span.shape[2] - self.recent_window :] if rows.shape[2] == 1 else span

    def _set_window(self, held: Channels, rows: Tensor) -> None:
        if rows.shape[2]:
            held.window[:, :, -rows.shape[2] :] = rows

    def follow(self, handle: Pruned, mask: Tensor | None) -> None:
        """Store the sinks among the tokens that just came."""
        if handle.new > 1 and not torch.compiler.is_compiling():
            refuse_right_padding(mask, int(self.length))
        if not self.sink_count:
            return
        before = self.length - handle.new
        self._find_first(mask, self.max_length)
        for held, rows in zip(self.held, handle.rows, strict=True):
            self._put_sinks(held, self._at_sinks(rows, before), before, handle.new)

    def _find_first(self, mask: Tensor | None, length: int) -> None:
        if mask is not None:
            self.first.copy_(first_seen(mask, length).expand(self.batch))

    def _put_sinks(self, held: Channels, rows: Tensor, before: Any, new: int) -> None:
        slot = self.sink_columns() - before
        arrived = ((slot >= 0) & (slot < new))[:, None, :, None]
        held.sinks.copy_(torch.where(arrived, rows, held.sinks))

    def _crop(self, count: int) -> None:
        self.length.sub_(count)
        for held in self.held:
            held.window.copy_(held.window.roll(count, dims=2))  # `_oldest` knows that the first are none now

    def _oldest_row(self) -> int:
        return max(0, int(self._oldest))

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


def _fix(*tensors: Tensor) -> None:
    """Tell the compiler that these tensors stay where they are, so that CUDA graphs may write into them."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)
