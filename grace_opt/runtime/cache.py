"""The channel-pruned cache of a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from grace_opt.errors import InputError
from grace_opt.masks import KVMask, load_mask
from grace_opt.readout import Readout
from grace_opt.runtime import attention
from grace_opt.runtime.layer import PrunedLayer
from grace_opt.runtime.ragged import RaggedLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PrunedCache(Cache):
    """A transformers ``Cache`` whose layers hold the kept channels of a mask. Made by `cache`."""

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held for tokens."""
        return cache_nbytes(self)


def cache(mask: KVMask | str | Path, model: PreTrainedModel) -> PrunedCache:
    """A new, empty cache for ``model(..., past_key_values=...)`` and ``model.generate``.

    Layers that the mask leaves out, and the sliding-window layers of a mixed model, get transformers' own cache
    layer. Sets the model's attention implementation to ``grace_opt``, which is SDPA wherever keys are not pruned.

    Raises:
        InputError: for a mask of another model, a mask that this runtime cannot execute yet (pruned values, pruned
            prefill), or a model whose attention cannot be replaced.
    """
    mask = mask if isinstance(mask, KVMask) else load_mask(mask)
    attention.require_attention_interface(model)
    mask.check_model(model.config, str(model.config.name_or_path))
    if mask.value_keep:
        raise InputError("this mask prunes value channels, which the runtime cannot execute yet; solve keys only")
    if mask.prefill != "full":
        raise InputError(f"this mask asks for {mask.prefill} prefill, and the runtime can only run full prefill yet")
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    for index, keep in mask.key_keep.items():
        if type(layers[index]) is not DynamicLayer:
            raise InputError(
                f"layer {index} of this model needs a {type(layers[index]).__name__}, whose channels cannot be pruned "
                "yet; leave the layer out of the mask"
            )
        rows = [torch.from_numpy(kept.astype(np.int64)) for kept in keep]
        rest = (mask.head_dim, mask.sinks, mask.recent_window, index, _readouts(mask, index, len(keep)))
        ragged = len({len(kept) for kept in keep}) > 1
        layers[index] = RaggedLayer(rows, *rest) if ragged else PrunedLayer(torch.stack(rows), *rest)
    model.set_attn_implementation(attention.NAME)
    return PrunedCache(layers=layers)


def _readouts(mask: KVMask, layer: int, heads: int) -> list[Readout] | Literal["prefill"] | None:
    if mask.readout_scope == "static":
        return [mask.static_readout("key", layer, head) for head in range(heads)]
    return "prefill" if mask.readout_scope == "prefill" else None


def cache_nbytes(past: Cache) -> int:
    """Bytes of every tensor that a transformers cache holds, each storage counted once and whole."""
    storages: dict[int, int] = {}
    for layer in past.layers:
        held = layer.tensors() if isinstance(layer, PrunedLayer | RaggedLayer) else vars(layer).values()
        for tensor in held:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def full_cache_nbytes(past: Cache) -> int:
    """Bytes that the same tokens would take if no channel were pruned."""
    total = cache_nbytes(past)
    for layer in past.layers:
        if isinstance(layer, PrunedLayer | RaggedLayer):
            total += layer.full_nbytes() - cache_nbytes(Cache(layers=[layer]))
    return total
