"""The channel-pruned cache of a whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache

from grace_opt.compression.budget import Budget
from grace_opt.compression.headmaps import KINDS
from grace_opt.compression.integers import Bits
from grace_opt.compression.mask import KVMask, load_mask
from grace_opt.compression.method import METHODS, Method
from grace_opt.errors import InputError, did_you_mean
from grace_opt.heads import Kind
from grace_opt.models.config import text_config
from grace_opt.runtime import attention
from grace_opt.runtime.layer import PrunedLayer
from grace_opt.runtime.plan import LayerPlan
from grace_opt.runtime.ragged import RaggedLayer
from grace_opt.runtime.static import StaticPrunedLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PrunedCache(Cache):
    """A transformers ``Cache`` whose layers hold the kept channels only. Made by `cache` and `online_cache`."""

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held for tokens."""
        return cache_nbytes(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -``tokens_to_remove`` tokens, in all layers or in none.

        Raises InputError if a layer cannot: it can as many as its recent window has, at most 32.
        """
        for layer in self.layers:
            if isinstance(layer, PrunedLayer | RaggedLayer):
                layer.removable(tokens_to_remove)
        super().crop(tokens_to_remove)


def cache(
    mask: KVMask | str | Path,
    model: PreTrainedModel,
    *,
    max_length: int | None = None,
    key_bits: Bits | None = None,
    value_bits: Bits | None = None,
    offload: bool = False,
) -> PrunedCache:
    """A new, empty cache for ``model(..., past_key_values=...)`` and ``model.generate``.

    Layers that the mask leaves out, and the sliding-window layers of a mixed model, get transformers' own cache
    layer. Sets the model's attention implementation to ``grace_opt``, which is SDPA wherever keys are not pruned.

    Args:
        mask: a folder or a `KVMask`.
        max_length: preallocate for so many tokens, for torch.compile and CUDA graphs; None: grow as tokens come.
        key_bits: hold the kept channels of old keys as integers of 2, 3, 4 or 8 bits.
        value_bits: the same of values.
        offload: keep each layer's tensors on the CPU but while it attends.

    Raises:
        InputError: for a mask of another model, a mask that this runtime cannot execute (pruned prefill), a model whose
            attention cannot be replaced, or integers in a preallocated cache.
    """
    mask = mask if isinstance(mask, KVMask) else load_mask(mask)
    attention.require_attention_interface(model)
    mask.check_model(model.config, str(model.config.name_or_path))
    if mask.prefill != "full":
        raise InputError(f"this mask asks for {mask.prefill} prefill, and the runtime can only run full prefill")
    bits = _bits(key_bits, value_bits)
    plans: dict[int, LayerPlan] = {}
    policy = replace(METHODS["grace-opt"], recent_window=mask.recent_window, sinks=mask.sinks)
    for index in sorted({*mask.key_keep, *mask.value_keep}):
        keep: dict[Kind, Sequence[Tensor]] = {
            kind: [torch.from_numpy(kept.astype(np.int64)) for kept in keeps[index]]
            for kind, keeps in zip(KINDS, (mask.key_keep, mask.value_keep), strict=True)
            if index in keeps
        }
        heads = mask.num_key_value_heads
        readouts: Any = "prefill" if mask.readout_scope == "prefill" else None
        if mask.readout_scope == "static":
            readouts = {kind: [mask.static_readout(kind, index, head) for head in range(heads)] for kind in keep}
        plans[index] = LayerPlan(
            index, mask.sinks, mask.recent_window, policy, heads, mask.head_dim, keep, readouts=readouts, bits=bits
        )
    return _assembled(model, plans, max_length, offload)


def online_cache(
    model: PreTrainedModel,
    method: Method | str = "grace-opt",
    *,
    ratio: float,
    value_ratio: float = 0.0,
    max_length: int | None = None,
    key_bits: Bits | None = None,
    value_bits: Bits | None = None,
    offload: bool = False,
) -> PrunedCache:
    """As `cache`, but each prompt chooses its own channels, layer by layer, right after its attention was computed.

    The method's objective, protection and read-out are applied on the model's device, to each row of the batch; every
    head prunes the same number of channels, as a layer cannot wait for those behind it. The solver is greedy, or
    independent (ThinK).

    Raises:
        InputError: as `cache`; for a method that this cannot run (projections, whole tokens, other solvers), or an
            unknown one; for ratios outside [0, 1).
    """
    policy = METHODS[method] if isinstance(method, str) and method in METHODS else method
    if isinstance(policy, str):
        raise InputError(f"unknown method {method!r}{did_you_mean(policy, METHODS)}")
    if policy.structure != "channels" or policy.solver not in ("greedy", "independent"):
        raise InputError(
            "a cache that chooses its channels from each prompt runs methods that select channels by the greedy or the "
            f"independent solver, not {policy.structure} by {policy.solver}; make a mask with grace-opt solve instead"
        )
    attention.require_attention_interface(model)
    plan = LayerPlan(
        0,
        policy.sinks,
        policy.recent_window,
        policy,
        budget=Budget(ratio, value_ratio),
        readouts=None if policy.readout == "none" else "prefill",
        bits=_bits(key_bits or policy.key_bits, value_bits or policy.value_bits),
    )
    layers = DynamicCache(config=text_config(model.config)).layers
    plans = {index: replace(plan, index=index) for index, layer in enumerate(layers) if type(layer) is DynamicLayer}
    return _assembled(model, plans, max_length, offload)


def _bits(key_bits: Bits | None, value_bits: Bits | None) -> dict[Kind, Bits]:
    bits = {kind: each for kind, each in zip(KINDS, (key_bits, value_bits), strict=True) if each is not None}
    for each in bits.values():
        if each not in get_args(Bits):
            raise InputError(f"packed integers have 2, 3, 4 or 8 bits, got {each}")
    return bits


def _assembled(
    model: PreTrainedModel, plans: Mapping[int, LayerPlan], max_length: int | None, offload: bool
) -> PrunedCache:
    config = text_config(model.config)
    if max_length is not None and max_length < 1:
        raise InputError(f"max_length must be at least 1, got {max_length}")
    if max_length is not None and any(plan.bits for plan in plans.values()):
        raise InputError("integers need a cache that grows; leave out max_length, or key_bits and value_bits")
    layers: list[Any] = DynamicCache(config=config).layers
    kinds = [type(layer) for layer in layers]
    if max_length is not None:
        layers = StaticCache(config=config, max_cache_len=max_length).layers
    for index, plan in plans.items():
        if kinds[index] is not DynamicLayer:
            raise InputError(
                f"layer {index} of this model needs a {kinds[index].__name__}, whose channels cannot be pruned yet; "
                "leave the layer out of the mask"
            )
        layers[index] = _layer(plan, max_length)
        layers[index].offloading = offload
    model.set_attn_implementation(attention.NAME)
    return PrunedCache(layers=layers)


def _layer(plan: LayerPlan, max_length: int | None) -> PrunedLayer | RaggedLayer:
    def made(part: LayerPlan) -> PrunedLayer:
        return PrunedLayer(part) if max_length is None else StaticPrunedLayer(part, max_length)

    if plan.budget is not None:
        return made(plan)
    assert plan.heads is not None
    groups: dict[tuple[int, ...], list[int]] = {}
    for head in range(plan.heads):
        groups.setdefault(tuple(len(keep[head]) for keep in plan.keep.values()), []).append(head)
    parts = [
        plan.part(heads, {kind: torch.stack([keep[head] for head in heads]) for kind, keep in plan.keep.items()})
        for _, heads in sorted(groups.items())
    ]
    if len(parts) == 1:
        return made(parts[0])
    return RaggedLayer(plan, [heads for _, heads in sorted(groups.items())], [made(part) for part in parts])


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
