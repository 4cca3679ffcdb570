"""The attention function that reads a channel-pruned cache, registered with transformers as ``grace_opt``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from grace_opt.errors import InputError
from grace_opt.models.config import stated, text_config
from grace_opt.runtime.attend import attend

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from grace_opt.runtime.layer import PrunedLayer

NAME = "grace_opt"
_ANY = "grace_opt_any"
_HARMLESS = ("position_ids", "cache_position")  # tensors that only say where the queries are
# A context variable, not a module global: two threads may run two models at once.
_function: ContextVar[Callable[..., Any]] = ContextVar("grace_opt_attention_function")


class Pruned:
    """What a pruned layer's ``update`` returns in place of keys and values; only `attention` can read it.

    ``prompt``: the whole keys and values [B, H, T, D] if the cache was empty before. If it was not: ``spans``, the rows
    of keys and values [B, H, _, e] that the new queries may see whole, the last ones, and ``rows``, the new ones.
    ``new``: how many tokens came with this update.
    """

    def __init__(
        self,
        layer: PrunedLayer,
        new: int,
        prompt: tuple[Tensor, Tensor] | None,
        spans: Sequence[Tensor] = (),
        rows: Sequence[Tensor] = (),
    ) -> None:
        self.layer, self.new, self.prompt, self.spans, self.rows = layer, new, prompt, spans, rows
        self.values: Tensor | None = None  #: whole values, as they were given to the model

    def __getattr__(self, name: str) -> Any:
        # Reached by a stock attention function, or by model code that looks into the keys itself.
        raise InputError(
            f"these keys are channel-pruned and only the {NAME!r} attention function can read them: call "
            f"model.set_attn_implementation({NAME!r}) again if it was switched; if it was not, this model "
            "handles its cached keys itself and is not supported"
        )


class RaggedPruned:
    """What a ragged layer's ``update`` returns in place of keys and values; only `attention` can read it."""

    def __init__(self, heads: list[Tensor], parts: list[Pruned]) -> None:
        self.heads = heads  #: int64[h], the KV heads of each part
        self.parts = parts

    __getattr__ = Pruned.__getattr__


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | Pruned | RaggedPruned,
    value: Tensor | Pruned | RaggedPruned,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention for transformers: SDPA for ordinary keys and for prefill, pruned scores for a filled cache.

    query [B, Hq, n, D], key and value [B, Hkv, T, D] or what a pruned layer gives, mask bool or additive
    [B or 1, 1, n, T] or None -> ([B, n, Hq, Dv], None). The scores of a filled cache are computed from the kept
    channels of all T tokens; those of the dropped channels are added for sinks and recent tokens, so the softmax is the
    same as over keys with the pruned channels of all other tokens set to zero, or to what the read-out makes of the
    kept ones. Values are read in the same way. O(B Hq n T (dk + dv)).

    Raises:
        InputError: for logit soft-capping, learnt attention sinks and position biases; for sliding windows over pruned
            keys; for rows padded on the right.
    """
    refuse_unsupported(kwargs)
    if isinstance(key, RaggedPruned):
        return _by_part(module, query, key, attention_mask, dropout=dropout, scaling=scaling, **kwargs), None
    if not isinstance(key, Pruned):
        return sdpa_attention_forward(
            module,
            query,
            key,
            cast(Tensor, value),
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            **kwargs,
        )
    layer = key.layer
    if kwargs.get("sliding_window") is not None:
        raise InputError(f"layer {layer.index} attends in a sliding window; leave it out of the mask")
    if getattr(module, "layer_idx", layer.index) != layer.index:
        raise InputError(
            f"{type(module).__name__} of layer {module.layer_idx} reads the cache of layer {layer.index}; models "
            "that run a layer several times are not supported"
        )
    if attention_mask is not None and attention_mask.shape[1] != 1:
        raise InputError("this model masks each head in its own way, which is not supported yet; use another model")
    scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
    changed = value if isinstance(value, Tensor) and value is not key.values else None
    if key.prompt is not None:
        layer.begin(module, query, scaling, attention_mask)
        # Of a static cache, the mask covers what is yet to come too.
        mask = None if attention_mask is None else attention_mask[..., : key.new]
        keys, values = key.prompt
        values = values if changed is None else changed
        out, _ = sdpa_attention_forward(module, query, keys, values, mask, dropout=dropout, scaling=scaling, **kwargs)
    else:
        layer.follow(key, attention_mask)
        out = attend(query, key, attention_mask, scaling, dropout, changed).transpose(1, 2).contiguous()
    layer.done()
    return out, None


def _by_part(
    module: torch.nn.Module, query: Tensor, key: RaggedPruned, attention_mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """`attention` of each part of a ragged layer, its heads put where they belong: [B, n, Hq, Dv]."""
    group = query.shape[1] // sum(map(len, key.heads))
    outs, order = [], []
    for heads, part in zip(key.heads, key.parts, strict=True):
        asked = (heads[:, None] * group + torch.arange(group, device=heads.device)).flatten()
        outs.append(attention(module, query[:, asked], part, part, attention_mask, **kwargs)[0])
        order.append(asked)
    return torch.cat(outs, dim=2)[:, :, torch.cat(order).argsort()]


def refuse_unsupported(kwargs: Mapping[str, Any]) -> None:
    """Raise InputError for what SDPA would silently leave out, or pruned scores would get wrong."""
    for name, what in (
        ("softcap", "caps its attention logits (softcap)"),
        ("s_aux", "has learnt attention sinks (s_aux)"),
        ("block_indices", "lets each query choose blocks of keys (block_indices)"),
        ("indices", "lets each query choose keys (indices)"),
        ("sinks", "has learnt attention sinks (sinks)"),
        ("position_bias", "adds a position bias to its attention logits"),
    ):
        if kwargs.get(name) is not None:
            raise InputError(f"this model {what}, which is not supported yet; use another model")
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor) and name not in _HARMLESS:
            raise InputError(
                f"this model gives its attention a tensor {name!r}, which is not supported yet; use another model"
            )


def observing(see: Callable[..., None]) -> Callable[..., Any]:
    """SDPA that first calls ``see(module, query, key, value, scaling, arguments)``, for `attending_with`."""

    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        refuse_unsupported(kwargs)
        see(module, query, key, value, scaling if scaling is not None else query.shape[-1] ** -0.5, kwargs)
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    return attend


@contextmanager
def attending_with(model: PreTrainedModel, function: Callable[..., Any]) -> Iterator[None]:
    """Route the model's attention through a function with transformers' signature, and back when done."""
    before = model.config._attn_implementation
    token = _function.set(function)
    model.set_attn_implementation(_ANY)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _function.reset(token)


def register(name: str, function: Callable[..., Any]) -> None:
    """Make an attention function known to transformers, with SDPA's masks (without them, padding is ignored)."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


def require_attention_interface(model: PreTrainedModel) -> None:
    """Raise InputError, in a sentence, if the model's attention cannot be replaced."""
    name = type(model).__name__
    config = text_config(model.config)
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"{name} is an encoder-decoder model; only decoder-only models are supported")
    if stated(config, "kv_lora_rank"):
        raise InputError(f"{name} uses multi-head latent attention, which caches no key channels to prune")
    if not model._can_set_attn_implementation():
        raise InputError(
            f"{name} does not use transformers' attention interface, so its attention can be neither observed "
            "nor replaced; use a model that does"
        )


def _any(*arguments: Any, **more: Any) -> Any:
    return _function.get()(*arguments, **more)


register(NAME, attention)
register(_ANY, _any)
