"""Rival caches of benchmarks/runtime.py that no library has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from grace_opt import KVMask


class InflatingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """ThinK (arXiv 2407.21018) as its published code would have to store it: the prompt's keys, but for the last
    ``recent_window``, hold the kept channels only, and every step inflates them to full width, with zeros, for SDPA.
    Tokens that are generated stay whole.
    """

    def __init__(self, keep: Tensor, recent_window: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keep, self.recent_window = keep, recent_window
        self.pruned: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store tokens; returns whole keys and values."""
        if self.pruned is not None:
            keys, values = super().update(key_states, value_states)
            index = self.keep[None, :, None].expand(*self.pruned.shape)
            whole = keys.new_zeros(*self.pruned.shape[:3], keys.shape[3]).scatter_(3, index, self.pruned)
            return torch.cat([whole, keys], dim=2), values
        old = max(0, key_states.shape[2] - self.recent_window)
        index = self.keep[None, :, None].expand(len(key_states), -1, old, -1)
        self.pruned = key_states[:, :, :old].gather(3, index)
        super().update(key_states[:, :, old:].clone(), value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """How many tokens have come."""
        return super().get_seq_length() + (0 if self.pruned is None else self.pruned.shape[2])

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Length and offset of the keys that a mask must cover."""
        new = query_length if isinstance(query_length, int) else len(query_length)
        return self.get_seq_length() + new, 0


def think_cache(mask: KVMask, config: Any) -> Cache:
    """A cache that stores the mask's key channels and inflates them at every step."""
    layers = DynamicCache(config=config).layers
    for index, keep in mask.key_keep.items():
        rows = torch.stack([torch.from_numpy(kept).long() for kept in keep])
        layers[index] = InflatingLayer(rows, mask.windows.recent_window)
    return Cache(layers=layers)
