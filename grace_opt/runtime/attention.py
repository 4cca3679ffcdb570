"""The attention function that reads a channel-pruned cache, registered with transformers as ``grace_opt``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from grace_opt.errors import InputError
from grace_opt.geometry import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from grace_opt.runtime.layer import PrunedLayer

NAME = "grace_opt"
_ANY = "grace_opt_any"
# A context variable, not a module global: two threads may run two models at once.
_function: ContextVar[Callable[..., Any]] = ContextVar("grace_opt_attention_function")
# Scores of one block of queries, in elements: bounds the memory of chunked prefill over a long cache.
_BLOCK = 1 << 24


class PrunedKeys:
    """What a pruned layer's ``update`` returns in place of the key tensor; only `attention` can read it."""

    def __init__(self, layer: PrunedLayer, prefill_keys: Tensor | None, residual: Tensor, chunk: int) -> None:
        self.layer = layer
        self.prefill_keys = prefill_keys  #: [B, H, T, D], the whole keys, when the cache was empty before
        self.residual = residual  #: [B, H, c, D - dk], the dropped channels of the last c tokens
        self.chunk = chunk  #: how many tokens came with this update

    def __getattr__(self, name: str) -> Any:
        # Reached by a stock attention function, or by model code that looks into the keys itself.
        raise InputError(
            f"these keys are channel-pruned and only the {NAME!r} attention function can read them: call "
            f"model.set_attn_implementation({NAME!r}) again if it was switched; if it was not, this model "
            "handles its cached keys itself and is not supported"
        )


class RaggedKeys:
    """What a ragged layer's ``update`` returns in place of the key tensor; only `attention` can read it."""

    def __init__(self, heads: list[Tensor], updates: list[tuple[PrunedKeys, Tensor]]) -> None:
        self.heads = heads  #: int64[h], the KV heads of each part
        self.updates = updates  #: each part's keys and values
        self.layer = updates[0][0].layer

    __getattr__ = PrunedKeys.__getattr__


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | PrunedKeys | RaggedKeys,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention for transformers: SDPA for ordinary keys and for prefill, pruned scores for a filled cache.

    query [B, Hq, n, D], value [B, Hkv, T, Dv], mask bool or additive [B or 1, 1, n, T] or None ->
    ([B, n, Hq, Dv], None). The scores of a filled cache are computed from the kept channels of all T tokens; those
    of the dropped channels are added for sinks and recent tokens, so the softmax is the same as over keys with
    the pruned channels of all other tokens set to zero, or to what the read-out makes of the kept ones.
    O(B Hq n T (dk + Dv)).

    Raises:
        InputError: for logit soft-capping, learnt attention sinks and position biases; for sliding windows over pruned
            keys.
    """
    refuse_unsupported(kwargs)
    if isinstance(key, RaggedKeys):
        return _by_part(module, query, key, attention_mask, dropout=dropout, scaling=scaling, **kwargs), None
    if not isinstance(key, PrunedKeys):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("sliding_window") is not None:
        raise InputError(f"layer {key.layer.index} attends in a sliding window; leave it out of the mask")
    if getattr(module, "layer_idx", key.layer.index) != key.layer.index:
        raise InputError(
            f"{type(module).__name__} of layer {module.layer_idx} reads the cache of layer {key.layer.index}; models "
            "that run a layer several times are not supported"
        )
    if attention_mask is not None and attention_mask.shape[1] != 1:
        raise InputError("this model masks each head in its own way, which is not supported yet; use another model")
    key.layer.find_sinks(attention_mask)
    if key.prefill_keys is not None:
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        key.layer.fit(query, key.prefill_keys, value, scale, attention_mask)
        return sdpa_attention_forward(
            module, query, key.prefill_keys, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
    new = query.shape[2]
    block = max(1, _BLOCK // (query.shape[0] * query.shape[1] * value.shape[2]))
    if new <= block:
        out = _attend(query, key, value, attention_mask, scaling, new, dropout)
    else:
        parts = []
        for low in range(0, new, block):
            part = slice(low, low + block)
            mask = None if attention_mask is None else attention_mask[:, :, part]
            parts.append(_attend(query[:, :, part], key, value, mask, scaling, new - low, dropout))
        out = torch.cat(parts, dim=2)
    return out.transpose(1, 2).contiguous(), None


def _by_part(
    module: torch.nn.Module, query: Tensor, key: RaggedKeys, attention_mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """`attention` of each part of a ragged layer, its heads put where they belong: [B, n, Hq, Dv]."""
    group = query.shape[1] // sum(map(len, key.heads))
    values = key.updates[0][1]
    out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], values.shape[-1], dtype=values.dtype)
    for heads, (keys, part) in zip(key.heads, key.updates, strict=True):
        asked = (heads[:, None] * group + torch.arange(group, device=heads.device)).flatten()
        out[:, :, asked] = attention(module, query[:, asked], keys, part, attention_mask, **kwargs)[0]
    return out


def _attend(
    query: Tensor, key: PrunedKeys, value: Tensor, mask: Tensor | None, scaling: float, age: int, dropout: float
) -> Tensor:
    """One block of queries [B, Hq, n, D], the first of them ``age`` tokens before the cache's end."""
    layer = key.layer
    batch, heads, new, _ = query.shape
    kv_heads, tokens = value.shape[1], value.shape[2]
    # All queries of a KV head side by side, so that the cache is read once for the whole group.
    kept, dropped = layer.asked(query.reshape(batch, kv_heads, -1, query.shape[-1]) * scaling)
    scores = torch.matmul(kept, layer.kept.mT).view(batch, kv_heads, -1, new, tokens)
    if dropped.shape[-1]:
        _add_whole_tokens(scores, dropped, key, tokens - age)
    if mask is None and new > 1:  # transformers leaves a mask out only where it would be causal
        position = torch.arange(tokens, device=query.device)
        mask = position <= position[tokens - age : tokens - age + new, None]
    if mask is not None:
        mask = mask.unsqueeze(2) if mask.dim() == 4 else mask  # [B or 1, 1, 1, n, T]; the causal one above is [n, T]
        # The lowest finite number, not -inf: rows that are all padding must not become NaN.
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    if dropout:
        weights = torch.nn.functional.dropout(weights, dropout)
    return torch.matmul(weights.view(batch, kv_heads, -1, tokens), value).view(batch, heads, new, -1)


def _add_whole_tokens(scores: Tensor, dropped: Tensor, key: PrunedKeys, first: int) -> None:
    """Add, in place, the dropped channels' part of the scores of the tokens that are whole.

    scores [B, H, G, n, T], dropped queries [B, H, G n, D - dk], ``first`` the position of the first query. A
    query at position t sees the token at s whole if t - s < recent_window, if s is a sink, or if both came in
    the same multi-token update (prefill attends in full, as in ThinK).
    """
    layer = key.layer
    new, tokens = scores.shape[-2:]
    recent = key.residual.shape[2]
    start = tokens - recent
    near: Tensor | None = None  # None: all of the residual is whole for every query
    if key.chunk > 1 and recent > key.chunk:
        asked = torch.arange(first, first + new, device=scores.device)[:, None]
        stored = torch.arange(start, tokens, device=scores.device)
        near = (asked - stored < layer.recent_window) | (stored >= tokens - key.chunk)
    if recent:
        extra = torch.matmul(dropped, key.residual.mT).view(*scores.shape[:-1], recent)
        scores[..., start:] += extra if near is None else extra * near
    if layer.sinks is None:
        return
    extra = torch.matmul(dropped, layer.sinks.mT).view(*scores.shape[:-1], -1)
    if layer.sinks_start is not None and layer.sinks_end <= start:  # all rows alike, and none of them counted above
        scores[..., layer.sinks_start : layer.sinks_end] += extra
        return
    column = layer.sink_columns()  # [B, sinks]
    counted = (column >= start)[:, None]
    if near is not None:
        counted = counted & near[:, (column - start).clamp(0, recent - 1)].transpose(0, 1)
    # Sinks that have not come yet hold zeros: where they point to does not matter.
    column = column.clamp(max=tokens - 1)[:, None, None, None].expand(extra.shape)
    scores.scatter_add_(-1, column, extra * ~counted[:, None, None])


def refuse_unsupported(kwargs: Mapping[str, Any]) -> None:
    """Raise InputError for what SDPA would silently leave out, or pruned scores would get wrong."""
    for name, what in (
        ("softcap", "caps its attention logits (softcap)"),
        ("s_aux", "has learnt attention sinks (s_aux)"),
        ("position_bias", "adds a position bias to its attention logits"),
    ):
        if kwargs.get(name) is not None:
            raise InputError(f"this model {what}, which is not supported yet; use another model")


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
    if getattr(config, "kv_lora_rank", None):
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
