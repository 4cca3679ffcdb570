"""Several caches of one row each that decode together: a model's weights, most of a token's time, are read once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from grace_opt.models.attention import NAME, Ours, switch
from grace_opt.runtime.handle import TogetherHandle
from grace_opt.runtime.layer import PrunedLayer
from grace_opt.runtime.ragged import RaggedLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TogetherLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The layers of one depth in several caches, one a row, for updates of a single token."""

    is_sliding = False
    is_compileable = False

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers = list(layers)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The layers hold tokens already."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Store a new token of each row, [B, Hkv, 1, D]."""
        rows = [
            layer.update(key_states[b : b + 1], value_states[b : b + 1], *args, **kwargs)
            for b, layer in enumerate(self.layers)
        ]
        handle = TogetherHandle(rows)
        return handle, handle

    def get_seq_length(self) -> int:
        """Of the longest row."""
        return max(int(layer.get_seq_length()) for layer in self.layers)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """A single token sees all that its row holds, so no mask is read."""
        return self.get_seq_length() + int(query_length), Ours(0)

    def get_max_length(self) -> int:
        """None is set."""
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers before 5.10


def decodes_together(model: PreTrainedModel, pasts: Sequence[Cache]) -> bool:
    """Whether `together` can run these caches: each row's position must be given, and every layer must hold tokens."""
    known = "position_ids" in inspect.signature(model.forward).parameters
    return known and all(
        isinstance(layer, PrunedLayer | RaggedLayer | DynamicLayer) for past in pasts for layer in past.layers
    )


@contextmanager
def together(model: PreTrainedModel, pasts: Sequence[Cache]) -> Iterator[Any]:
    """A cache whose row b is ``pasts[b]``, of one row and any length, compressed or not; each goes on by itself.

    For decoding: one token a row, ``position_ids`` given, no attention mask. Meanwhile the model's attention is ours.
    """
    back = switch(model, NAME)
    try:
        yield Cache(layers=[TogetherLayer(layers) for layers in zip(*(past.layers for past in pasts), strict=True)])
    finally:
        back()


def step_together(model: PreTrainedModel, pasts: Sequence[Any], tokens: Sequence[int]) -> Tensor:
    """Logits [B, vocabulary] after one more token of each row."""
    ids = torch.tensor(tokens, device=model.device)[:, None]
    at = ids.new_tensor([int(past.get_seq_length()) for past in pasts])[:, None]
    with torch.inference_mode(), together(model, pasts) as past:
        logits: Tensor = model(input_ids=ids, position_ids=at, past_key_values=past, use_cache=True).logits[:, -1]
    return logits
