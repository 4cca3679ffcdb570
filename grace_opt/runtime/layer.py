"""One layer of the channel-pruned cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from grace_opt.errors import InputError
from grace_opt.graphs.observed import Observed
from grace_opt.readout import MIXING, Readout, fit, moments
from grace_opt.runtime.attention import PrunedKeys

OBSERVATION_WINDOW = 32  # queries whose attention weighs the tokens that read-outs are fitted to


class PrunedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Kept channels of all tokens; dropped channels of the sinks and the recent window only; whole values.

    "Base plus residual window": a token that leaves the window is forgotten by shifting the residual; nothing is
    packed again. Buffers grow by 1/128 of their length, so at most 0.8 % of them is waste, and a decoded token
    copies about 128 tokens' worth of cache in the mean instead of all of it.

    Args:
        keep: int64[Hkv, dk], the kept channels of each KV head.
        head_dim: channels D of an original key.
        sinks, recent_window: how many tokens stay whole at the start and at the end.
        index: the layer's number, for messages.
        readouts: one for each KV head, or "prefill" to fit them to each row of the first update; None: dropped channels
            count as zero. Whole tokens then hold the residual k_P - B k_A - constant in place of k_P, and queries ask
            for q_A + B'q_P: one formula for all tokens, short of q_P'constant, which cancels in the softmax.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False

    dtype: torch.dtype
    device: torch.device
    _kept: Tensor  #: [B, Hkv, capacity, dk]
    _values: Tensor  #: [B, Hkv, capacity, Dv]
    _recent: Tensor  #: [B, Hkv, min(T, recent_window), D - dk]
    sinks: Tensor | None  #: [B, Hkv, sinks, D - dk], once tokens have left the recent window
    _first: Tensor | None  #: int64[B], the position of each row's first real token
    _matrix: Tensor | None  #: [B, Hkv, D - dk, dk], the read-outs' B
    _constant: Tensor | None  #: [B, Hkv, 1, D - dk]

    def __init__(
        self,
        keep: Tensor,
        head_dim: int,
        sinks: int,
        recent_window: int,
        index: int,
        readouts: Sequence[Readout] | Literal["prefill"] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index = index
        self.width = keep.shape[1]
        self.sink_count = sinks if self.width < head_dim else 0
        self.recent_window = recent_window
        self._selection = _Selection(keep, head_dim)
        self.readouts = readouts if self.width < head_dim else None
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.is_initialized = False
        self.length = 0
        self._kept = self._values = self._recent = torch.empty(0)
        self.sinks = self._first = self._matrix = self._constant = None
        self.sinks_start: int | None = None  # position of the first sink, if it is the same in all rows
        self.sinks_end = 0  # one past the last sink of any row
        self._sinks_pending: Tensor | None = None  # dropped channels of the last tokens, sinks maybe among them

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device and shapes from the first states. Raises InputError if the mask does not fit them."""
        heads, head_dim = key_states.shape[1], key_states.shape[3]
        if self._selection.shape != (heads, head_dim):
            raise InputError(
                f"the mask has {self._selection.shape[0]} KV heads of {self._selection.shape[1]} channels in layer "
                f"{self.index}, the model has {heads} of {head_dim}; use a mask made for this model"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self._selection.to(self.device)
        batch, narrowed = key_states.shape[0], head_dim - self.width
        self._kept = key_states.new_empty(batch, heads, 0, self.width)
        self._values = value_states.new_empty(batch, heads, 0, value_states.shape[3])
        self._recent = key_states.new_empty(batch, heads, 0, narrowed)
        if self.readouts is not None and self.readouts != "prefill":
            self._set_readouts([self.readouts] * batch)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Store new tokens [B, Hkv, n, D]; returns a handle for `attention` in place of keys, and all values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.dtype != self.dtype or key_states.device != self.device:
            raise InputError(
                f"layer {self.index}'s cache holds {self.dtype} on {self.device} and was given {key_states.dtype} on "
                f"{key_states.device}; start a new cache"
            )
        before, new = self.length, key_states.shape[2]
        kept, dropped = self.split(key_states)
        dropped = self._residual(kept, dropped)
        self._kept = _append(self._kept, before, kept)
        self._values = _append(self._values, before, value_states)
        self.length = before + new
        # Until the first tokens leave the window, it holds the sinks too.
        leaving = self.sinks is None and self.sink_count > 0 and self.length > self.recent_window
        span = torch.cat([self._recent, dropped], dim=2) if new > 1 or leaving else dropped
        if leaving:
            self.sinks = dropped.new_zeros(*dropped.shape[:2], self.sink_count, dropped.shape[3])
            self._first = torch.zeros(len(dropped), dtype=torch.long, device=self.device)
            self._sinks_pending = span
        elif self.sinks_end > before:
            self._sinks_pending = dropped
        stays = min(self._recent.shape[2], max(0, self.recent_window - new))
        fresh = min(new, self.recent_window)
        if self._recent.shape[3]:
            # New tensors, not views: a view would hold on to the whole prompt's dropped channels.
            old = self._recent[:, :, self._recent.shape[2] - stays :]
            self._recent = torch.cat([old, dropped[:, :, new - fresh :]], dim=2)
        # A single query sees exactly the recent window whole. Several see each other, and a band of what was stored.
        residual = self._recent if new == 1 else span
        return PrunedKeys(self, key_states if before == 0 else None, residual, new), self._values[:, :, : self.length]

    @property
    def kept(self) -> Tensor:
        """[B, Hkv, T, dk]: the kept channels of all tokens."""
        return self._kept[:, :, : self.length]

    def split(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """[B, Hkv, m, D] -> each head's kept channels [.., dk] and its dropped ones [.., D - dk]."""
        order = self._selection.order
        states = states.gather(-1, order[None, :, None].expand(*states.shape[:3], -1))
        return states[..., : self.width], states[..., self.width :]

    def asked(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, Hkv, m, D] as they meet the kept channels, and the residuals of whole tokens."""
        kept, dropped = self.split(query)
        return (kept if self._matrix is None else kept + dropped @ self._matrix), dropped

    def _residual(self, kept: Tensor, dropped: Tensor) -> Tensor:
        """The dropped channels of keys, less what they are read as."""
        if self._matrix is None or self._constant is None:
            return dropped
        return dropped - kept @ self._matrix.mT - self._constant

    def fit(self, query: Tensor, keys: Tensor, value: Tensor, scaling: float, mask: Tensor | None) -> None:
        """After the first update: fit each row's read-outs to its old tokens, with the attention that its last queries
        pay them as weights (`grace_opt.readout`). A row without old tokens keeps reading zeros.
        """
        if self.readouts != "prefill":
            return
        tokens, rows = keys.shape[2], []
        starts = [0] * len(keys) if mask is None else _first_seen(mask, tokens).expand(len(keys)).tolist()
        if tokens - min(starts) <= self.sink_count + self.recent_window:
            return
        keep = self._selection.order[:, : self.width].cpu().numpy()
        for row, first in enumerate(starts):
            if tokens - first <= self.sink_count + self.recent_window:
                zeros = np.zeros((self._selection.shape[1] - self.width, self.width))
                rows.append([Readout(zeros.sum(1), zeros)] * len(keep))
                continue
            last = max(first, tokens - OBSERVATION_WINDOW)
            whole = (self.sink_count, self.recent_window)
            seen = Observed(query[row, :, last:], keys[row, :, first:], value[row, :, first:], scaling, *whole)
            about = moments(seen.keys[:, seen.prunable], seen.token_weights, MIXING["key"])
            rows.append([fit(each, kept) for each, kept in zip(about, keep, strict=True)])
        self._set_readouts(rows)
        self._recent = self._residual(self.kept[:, :, self.length - self._recent.shape[2] :], self._recent)
        if self.sinks is not None:
            columns = self.sink_columns().clamp(max=self.length - 1)[:, None, :, None]
            kept = self.kept.gather(2, columns.expand(-1, len(keep), -1, self.width))
            self.sinks = self._residual(kept, self.sinks)

    def _set_readouts(self, rows: Sequence[Sequence[Readout]]) -> None:
        matrix = np.array([[each.matrix for each in heads] for heads in rows])
        constant = np.array([[each.constant for each in heads] for heads in rows])
        self._matrix = torch.as_tensor(matrix, dtype=self.dtype, device=self.device)
        self._constant = torch.as_tensor(constant, dtype=self.dtype, device=self.device)[:, :, None]

    def find_sinks(self, mask: Tensor | None) -> None:
        """Store the dropped channels of the sinks among the tokens that just came or just left the window.

        The sinks are each row's first real tokens, so that padding on the left changes nothing. ``mask`` is the
        attention mask [B or 1, 1, n, T]: a row's first real token is the first that its last query may see.
        """
        if self._sinks_pending is None or self.sinks is None or self._first is None:
            return
        dropped, self._sinks_pending = self._sinks_pending, None
        before = self.length - dropped.shape[2]
        if mask is not None:
            self._first = _first_seen(mask, self.length).expand(len(self._first)).clone()
        slot = self.sink_columns() - before  # [B, sinks], where among these tokens each sink is
        arrived = (slot >= 0) & (slot < dropped.shape[2])
        index = slot.clamp(0, dropped.shape[2] - 1)[:, None, :, None].expand(self.sinks.shape)
        self.sinks = torch.where(arrived[:, None, :, None], dropped.gather(2, index), self.sinks)
        earliest, latest = int(self._first.min()), int(self._first.max())
        self.sinks_start = earliest if earliest == latest else None
        self.sinks_end = latest + self.sink_count

    def sink_columns(self) -> Tensor:
        """int64[B, sinks]: the position of each row's sinks."""
        assert self._first is not None
        return self._first[:, None] + torch.arange(self.sink_count, device=self._first.device)

    def tensors(self) -> list[Tensor]:
        """Every tensor that holds tokens."""
        if not self.is_initialized:
            return []
        held = [self._kept, self._values, self._recent, self.sinks, self._first, self._matrix, self._constant]
        return [tensor for tensor in held if tensor is not None]

    def full_nbytes(self) -> int:
        """Bytes of as many whole keys and values, without growth space."""
        if not self.is_initialized:
            return 0
        batch, heads, _, width = self._values.shape
        return batch * heads * self.length * (self._selection.shape[1] + width) * self._values.element_size()

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
        """Not possible: a token that left the window cannot be made whole again."""
        if tokens_to_remove:
            raise InputError(
                "a channel-pruned cache cannot be cropped, so assisted and speculative decoding are not supported yet"
            )

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
        self._kept, self._values, self._recent = change(self._kept), change(self._values), change(self._recent)
        if self.sinks is not None and self._first is not None:
            self.sinks, self._first = change(self.sinks), change(self._first)
        if self._matrix is not None and self._constant is not None:
            self._matrix, self._constant = change(self._matrix), change(self._constant)


def _first_seen(mask: Tensor, length: int) -> Tensor:
    """int64[B or 1]: the first position that each row's last query may see, under a mask [B or 1, 1, n, T]."""
    seen = mask[:, 0, -1, :length]
    seen = seen if seen.dtype == torch.bool else seen > -1e3  # masks go by -1e4 and lower
    return torch.where(seen.any(1), seen.int().argmax(1), length)


class _Selection:
    """The channel order of a layer; it belongs to the mask, not to any token."""

    def __init__(self, keep: Tensor, head_dim: int) -> None:
        self.shape = (keep.shape[0], head_dim)
        dropped = torch.ones(self.shape, dtype=torch.bool).scatter_(1, keep, False)
        behind = dropped.nonzero()[:, 1].view(keep.shape[0], -1)
        self.order = torch.cat([keep, behind], dim=1)

    def to(self, device: torch.device) -> None:
        self.order = self.order.to(device)


def _append(buffer: Tensor, length: int, new: Tensor) -> Tensor:
    """``buffer`` [B, H, capacity, d] with ``new`` [B, H, n, d] written from ``length`` on, grown if it must."""
    end = length + new.shape[2]
    # Autograd and inference mode forbid writing into what they have seen: then every update copies.
    frozen = torch.is_grad_enabled() or (buffer.is_inference() and not torch.is_inference_mode_enabled())
    if end > buffer.shape[2] or (frozen and length):
        capacity = end if length == 0 else end + end // 128
        grown = buffer.new_empty(*buffer.shape[:2], capacity, buffer.shape[3])
        grown[:, :, :length] = buffer[:, :, :length]
        buffer = grown
    buffer[:, :, length:end] = new
    return buffer
