"""A cache layer whose KV heads keep different numbers of channels: one `PrunedLayer` for the heads of each width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from grace_opt.errors import InputError
from grace_opt.readout import Readout
from grace_opt.runtime.attention import RaggedKeys
from grace_opt.runtime.layer import PrunedLayer


class RaggedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Heads of one width side by side, as a pruned layer; nothing is padded. Arguments as of `PrunedLayer`, but that
    ``keep`` holds int64[d] for each KV head.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(
        self,
        keep: Sequence[Tensor],
        head_dim: int,
        sinks: int,
        recent_window: int,
        index: int,
        readouts: Sequence[Readout] | Literal["prefill"] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index, self.shape = index, (len(keep), head_dim)
        self.heads, self.parts = [], []
        for width in sorted({len(kept) for kept in keep}):
            heads = [head for head, kept in enumerate(keep) if len(kept) == width]
            rows = torch.stack([keep[head] for head in heads])
            own = readouts if isinstance(readouts, str) or readouts is None else [readouts[head] for head in heads]
            self.heads.append(torch.tensor(heads))
            self.parts.append(PrunedLayer(rows, head_dim, sinks, recent_window, index, own))

    @property
    def is_initialized(self) -> bool:
        """Whether tokens have come."""
        return self.parts[0].is_initialized

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        """The base class sets it on creation; the parts know better."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """As of `PrunedLayer`."""
        if self.shape != (key_states.shape[1], key_states.shape[3]):
            raise InputError(
                f"the mask has {self.shape[0]} KV heads of {self.shape[1]} channels in layer {self.index}, the model "
                f"has {key_states.shape[1]} of {key_states.shape[3]}; use a mask made for this model"
            )
        self.heads = [heads.to(key_states.device) for heads in self.heads]
        for heads, part in zip(self.heads, self.parts, strict=True):
            part.lazy_initialization(key_states[:, heads], value_states[:, heads])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Store new tokens [B, Hkv, n, D]; returns a handle for `attention`, and values that only it may use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        updates = [
            part.update(key_states[:, heads], value_states[:, heads])
            for heads, part in zip(self.heads, self.parts, strict=True)
        ]
        return RaggedKeys(self.heads, updates), updates[0][1]

    def tensors(self) -> list[Tensor]:
        """Every tensor that holds tokens."""
        return [tensor for part in self.parts for tensor in part.tensors()]

    def full_nbytes(self) -> int:
        """Bytes of as many whole keys and values, without growth space."""
        return sum(part.full_nbytes() for part in self.parts)

    def reset(self) -> None:
        """Forget all tokens."""
        for part in self.parts:
            part.reset()

    def get_seq_length(self) -> int:
        """How many tokens have come."""
        return self.parts[0].get_seq_length()

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """As of `PrunedLayer`."""
        return self.parts[0].get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        """-1: it grows without limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers before 5.10

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible, as of `PrunedLayer`."""
        self.parts[0].crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search: row b becomes what row beam_idx[b] was."""
        for part in self.parts:
            part.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times."""
        for part in self.parts:
            part.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the given rows."""
        for part in self.parts:
            part.batch_select_indices(indices)

    def offload(self) -> None:
        """Move everything to the CPU."""
        for part in self.parts:
            part.offload()

    def prefetch(self) -> None:
        """Move everything back."""
        for part in self.parts:
            part.prefetch()
