"""One layer of the channel-pruned cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from grace_opt.compression.headmaps import AXES
from grace_opt.errors import InputError
from grace_opt.heads import Kind
from grace_opt.runtime.attend import kernel_reads
from grace_opt.runtime.attention import Pruned
from grace_opt.runtime.buffers import Growing, Integers, Store
from grace_opt.runtime.plan import LayerPlan
from grace_opt.runtime.side import Channels

_CROP = 32  # tokens that can be taken back, at most


class PrunedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Kept channels of all tokens; dropped channels of the sinks and of the recent window only.

    "Base plus residual window": a token that leaves the window is forgotten by shifting the window; nothing is packed
    again. All KV heads keep the same number of key channels, and of value channels (`RaggedLayer` for others).

    Rows of ``_CROP`` more tokens than the window, but no more than the window has, are held so that as many tokens can
    be taken back (`crop`): those that move into the window from behind are whole again.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    is_static = False

    dtype: torch.dtype
    device: torch.device
    first: Tensor  #: int64[B], the position of each row's first real token
    keys_held: Channels
    values_held: Channels

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.plan, self.index = plan, plan.index
        self.sink_count, self.recent_window = plan.sinks, plan.recent_window
        self.spare = min(self.recent_window, _CROP)
        self.offloading = False
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.is_initialized = False
        self.length: int = 0
        self.sinks_start: int | None = None  #: position of the first sink, if it is the same in all rows
        self.sinks_end = 0  #: one past the last sink of any row
        self._prompt: tuple[Tensor, Tensor] | None = None  # of the first update, until `begin`
        self._unattended = False  # whether tokens came that `attention` has not seen

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device and shapes from the first states. Raises InputError if the mask does not fit them."""
        self.plan.check(key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch = key_states.shape[0]
        self._elements = key_states.shape[1] * (key_states.shape[3] + value_states.shape[3])
        self.keys_held = self._channels("key", key_states)
        self.values_held = self._channels("value", value_states)
        self.first = torch.zeros(self.batch, dtype=torch.long, device=self.device)
        self.fused = kernel_reads(key_states, self.plan.bits)
        self.is_initialized = True

    def _channels(self, kind: Kind, states: Tensor) -> Channels:
        held = self.plan.channels(kind, states)
        held.store = self._store(kind, states[..., : held.width])
        dropped = states.shape[-1] - held.width
        held.window = states.new_empty(*states.shape[:2], 0, dropped)
        held.sinks = states.new_zeros(*states.shape[:2], self.sink_count, dropped)
        return held

    def _store(self, kind: Kind, like: Tensor) -> Store:
        bits = self.plan.bits.get(kind)
        if bits is None:
            return Growing(like)
        return Integers(like, bits, AXES[kind], self.recent_window + self.spare)

    @property
    def columns(self) -> int:
        """For how many tokens scores are computed."""
        return self.length

    @property
    def held(self) -> tuple[Channels, Channels]:
        """Keys and values."""
        return self.keys_held, self.values_held

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Store new tokens [B, Hkv, n, D]; returns a handle that only `attention` can read, for keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states)
        if self.offloading:
            self.prefetch()
        new = key_states.shape[2]
        self._grow(new)
        self._unattended = True
        before = self.length - new
        if self._is_prompt(before):
            self._prompt = key_states, value_states
            return self._given(Pruned(self, new, self._prompt), value_states)
        rows = [held.append(states, before) for held, states in zip(self.held, (key_states, value_states), strict=True)]
        spans = [self._shift(held, each) for held, each in zip(self.held, rows, strict=True)]
        return self._given(Pruned(self, new, None, spans, rows), None)

    def _given(self, handle: Pruned, prompt: Tensor | None) -> tuple[Pruned, Any]:
        """What the model gets in place of keys and values: whole values as they are, since some models change them."""
        if self.values_held.order is not None or "value" in self.plan.bits:
            return handle, handle
        handle.values = next(self.values_held.store.parts()) if prompt is None else prompt
        return handle, handle.values

    def _check(self, states: Tensor) -> None:
        if states.dtype != self.dtype or states.device != self.device:
            raise InputError(
                f"layer {self.index}'s cache holds {self.dtype} on {self.device} and was given {states.dtype} on "
                f"{states.device}; start a new cache"
            )
        if states.shape[0] != self.batch:
            raise InputError(
                f"layer {self.index}'s cache holds {self.batch} rows and was given {states.shape[0]}; start a new cache"
            )
        if self._unattended:
            raise InputError(
                f"layer {self.index}'s cache was given tokens whose attention was never computed (there was an error, "
                "or this model handles its cache itself); start a new cache"
            )

    def _grow(self, new: int) -> None:
        self.length += new

    def _is_prompt(self, before: Any) -> bool:
        return bool(before == 0)

    def _shift(self, held: Channels, rows: Tensor) -> Tensor:
        """Move new rows into the window; returns the rows that the new queries may see whole, the last ones."""
        span = torch.cat([held.window, rows], dim=2)
        kept = span[:, :, max(0, span.shape[2] - self.recent_window - self.spare) :]
        # A view would hold on to the whole prompt's dropped channels.
        held.window = kept if kept.shape[2] == span.shape[2] else kept.clone()
        return span[:, :, span.shape[2] - min(span.shape[2], self.recent_window) :] if rows.shape[2] == 1 else span

    def begin(self, module: Any, query: Tensor, scaling: float, mask: Tensor | None) -> None:
        """Store the first update: choose channels and fit read-outs if that is asked for, and find the sinks.

        The sinks are each row's first real tokens, so that padding on the left changes nothing. ``mask`` is the
        attention mask [B or 1, 1, n, T]: a row's first real token is the first that its last query may see.
        """
        if self._prompt is None:
            return
        states, self._prompt = self._prompt, None
        tokens = states[0].shape[2]
        refuse_right_padding(mask, tokens)
        self._find_first(mask, tokens)
        self.plan.begin(self.held, states, module, query, scaling, self.first)
        for held, each in zip(self.held, states, strict=True):
            kept, dropped = held.split(each)
            held.store.append(kept, 0)
            last = min(tokens, self.recent_window + self.spare)
            self._set_window(held, held.rows(kept[:, :, tokens - last :], dropped[:, :, tokens - last :]))
            self._put_sinks(held, held.rows(*(self._at_sinks(x, 0) for x in (kept, dropped))), 0, tokens)
        self._start_integers()

    def _set_window(self, held: Channels, rows: Tensor) -> None:
        held.window = rows.clone()

    def follow(self, handle: Pruned, mask: Tensor | None) -> None:
        """Store the sinks among the tokens that just came."""
        before = self.length - handle.new
        if handle.new > 1:
            refuse_right_padding(mask, self.length)
        if self.sinks_end <= before:
            return
        self._find_first(mask, self.length)
        for held, rows in zip(self.held, handle.rows, strict=True):
            self._put_sinks(held, self._at_sinks(rows, before), before, handle.new)
        self._start_integers()

    def done(self) -> None:
        """The attention of the tokens that came last was computed."""
        self._unattended = False
        if self.offloading:
            self.offload()

    def _find_first(self, mask: Tensor | None, length: int) -> None:
        """Where each row's real tokens begin."""
        if mask is not None:
            self.first = first_seen(mask, length).expand(self.batch).clone()
        earliest, latest = (0, 0) if mask is None else (int(self.first.min()), int(self.first.max()))
        self.sinks_start = earliest if earliest == latest else None
        self.sinks_end = latest + self.sink_count

    def _at_sinks(self, tokens: Tensor, before: Any) -> Tensor:
        """[B, H, m, d] of tokens from position ``before`` on -> [B, H, sinks, d], anything where there is none."""
        slot = (self.sink_columns() - before).clamp(0, tokens.shape[2] - 1)
        return tokens.gather(2, slot[:, None, :, None].expand(-1, tokens.shape[1], -1, tokens.shape[3]))

    def _put_sinks(self, held: Channels, rows: Tensor, before: Any, new: int) -> None:
        slot = self.sink_columns() - before
        arrived = ((slot >= 0) & (slot < new))[:, None, :, None]
        held.sinks = torch.where(arrived, rows, held.sinks)

    def sink_columns(self) -> Tensor:
        """int64[B, sinks]: the position of each row's sinks."""
        return self.first[:, None] + torch.arange(self.sink_count, device=self.first.device)

    def _start_integers(self) -> None:
        """Pack old tokens once the sinks have come; these stay as they are."""
        if self.plan.bits and self.sinks_end <= self.length:
            for held in self.held:
                if isinstance(held.store, Integers) and not held.store.started:
                    held.store.start(self.sinks_end)

    def tensors(self) -> list[Tensor]:
        """Every tensor that holds tokens."""
        if not self.is_initialized:
            return []
        return [*self.keys_held.tensors(), *self.values_held.tensors(), self.first]

    def full_nbytes(self) -> int:
        """Bytes of as many whole keys and values, without growth space."""
        if not self.is_initialized:
            return 0
        return self.batch * self._elements * int(self.length) * self.dtype.itemsize

    def get_seq_length(self) -> int:
        """How many tokens have come."""
        return self.length

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(length, offset) of the keys that a mask for ``query_length`` new tokens must cover."""
        # transformers before 5.4 passes the tensor of the new positions
        new = query_length if isinstance(query_length, int) else len(query_length)
        return self.length + new, 0

    def get_max_length(self) -> int:
        """-1: it grows without limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers before 5.10

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -``tokens_to_remove`` tokens (a positive number: all but so many, as before 5.10).

        Exact: what is left is as if they had never come. Raises InputError if that cannot be.
        """
        count = self.removable(tokens_to_remove)
        if count:
            self._crop(count)

    def _crop(self, count: int) -> None:
        self.length -= count
        for held in self.held:
            held.store.crop(self.length)
            held.window = held.window[:, :, : max(0, held.window.shape[2] - count)].clone()

    def removable(self, tokens_to_remove: int) -> int:
        """How many tokens `crop` would forget. Raises InputError if it cannot."""
        length = int(self.length)
        count = max(0, length - tokens_to_remove) if tokens_to_remove > 0 else min(-tokens_to_remove, length)
        if not count:
            return 0
        most = length - max(held.store.fixed for held in self.held)
        oldest = self._oldest_row()  # what moves into the recent window from behind must be whole
        if oldest > 0 and self.recent_window and any(held.order is not None for held in self.held):
            most = min(most, length - oldest - self.recent_window)
        if count > most:
            raise InputError(
                f"the last {count} tokens cannot be taken back, only {max(0, most)}: what would move into the recent "
                f"window of {self.recent_window} is pruned already; take back no more tokens than the window has, "
                f"{_CROP} at most, or start a new cache"
            )
        return count

    def _oldest_row(self) -> int:
        """The position of the first token in the window."""
        return self.length - self.keys_held.window.shape[2]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search: row b becomes what row beam_idx[b] was."""
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times."""
        self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the given rows."""
        self._each(lambda tensor: tensor[indices])

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._each(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back."""
        self._each(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        self.first = change(self.first)
        self.batch = len(self.first)
        for held in self.held:
            held.each(change)


def first_seen(mask: Tensor, length: int) -> Tensor:
    """int64[B or 1]: the first position that each row's last query may see, under a mask [B or 1, 1, n, T]; if there is
    none, ``length``.
    """
    seen = _seen(mask, length)
    return torch.where(seen.any(1), seen.int().argmax(1), length)


def _seen(mask: Tensor, length: int) -> Tensor:
    row = mask[:, 0, -1, :length]
    return row if row.dtype == torch.bool else row > -1e3  # masks go by -1e4 and lower


def refuse_right_padding(mask: Tensor | None, length: int) -> None:
    """The last tokens of a row are its recent window: they must be real."""
    if mask is not None:
        seen = _seen(mask, length)
        if bool((seen.any(1) & ~seen[:, -1]).any()):
            raise InputError("a row of the batch is padded on the right; pad prompts on the left")
