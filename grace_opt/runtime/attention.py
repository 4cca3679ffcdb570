"""The attention function that reads a compressed cache, registered with transformers as ``grace_opt``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from grace_opt.errors import InputError
from grace_opt.graphs.observed import OutputProjection, queries_of
from grace_opt.models.attention import NAME, ordinary, refuse_unsupported, register
from grace_opt.runtime.attend import attend
from grace_opt.runtime.handle import Handle, RaggedHandle, TogetherHandle
from grace_opt.runtime.kernels.contract import Request


def attention(
    module: torch.nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention for transformers: over a compressed cache, or as the model attends otherwise."""
    if isinstance(key, TogetherHandle):  # each row over its own cache; its one token sees all of that
        outs = [attention(module, query[b : b + 1], *of_row, None, **kwargs)[0] for b, of_row in enumerate(key.rows)]
        return torch.cat(outs), None
    attend = compressed if isinstance(key, Handle | RaggedHandle) else ordinary
    return attend(module, query, key, value, attention_mask, **kwargs)


def compressed(
    module: torch.nn.Module,
    query: Tensor,
    key: Handle | RaggedHandle,
    value: Tensor | Handle | RaggedHandle,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA for the prompt, scores from rows for a filled cache.

    query [B, Hq, n, D], key and value what a compressed layer gives, mask bool or additive [B or 1, 1, n, T] or None
    -> ([B, n, Hq, Dv], None). The scores of a filled cache are computed from the stored rows
    of all tokens; those of the residuals are added for sinks and recent tokens, so the softmax is the same as over keys
    in which all other tokens are what their codec reads them as. Values are read in the same way. Tokens that a policy
    dropped are not seen. O(B Hq n T (dk + dv)).

    Raises:
        InputError: for logit soft-capping, learnt attention sinks and position biases; for sliding windows over pruned
            keys; for rows padded on the right; where attention weights are asked for.
    """
    refuse_unsupported(kwargs)
    if kwargs.get("output_attentions", getattr(getattr(module, "config", None), "output_attentions", False)):
        raise InputError(
            "a compressed cache has no attention weights to give; leave out output_attentions, or run the model "
            "without this cache"
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
        layer.begin(query, scaling, attention_mask, OutputProjection(module, query.shape[1], key.prompt[1]))
        # Of a static cache, the mask covers what is yet to come too.
        mask = None if attention_mask is None else attention_mask[..., : key.new]
        keys, values = key.prompt
        values = values if changed is None else changed
        out, _ = sdpa_attention_forward(module, query, keys, values, mask, dropout=dropout, scaling=scaling, **kwargs)
    elif isinstance(key, RaggedHandle):
        out = _by_part(query, key, attention_mask, scaling, dropout)
    else:
        out = _follow(query, key, attention_mask, scaling, dropout, changed)
    layer.done()
    return out, None


def _follow(
    query: Tensor, handle: Handle, mask: Tensor | None, scaling: float, dropout: float, changed: Tensor | None
) -> Tensor:
    """Attention of tokens that follow a prompt: [B, n, Hq, Dv]."""
    mask = handle.layer.slot_mask(mask, handle.new)
    handle.layer.follow(handle, mask)
    return attend(Request(query, handle, mask, scaling, dropout, changed)).transpose(1, 2).contiguous()


def _by_part(query: Tensor, handle: RaggedHandle, mask: Tensor | None, scaling: float, dropout: float) -> Tensor:
    """The same, of each part of a ragged layer, its heads put where they belong."""
    group = query.shape[1] // sum(map(len, handle.heads))
    outs, order = [], []
    for heads, part in zip(handle.heads, handle.parts, strict=True):
        asked = queries_of(heads, group)
        outs.append(_follow(query[:, asked], part, mask, scaling, dropout, None))
        order.append(asked)
    return torch.cat(outs, dim=2)[:, :, torch.cat(order).argsort()]


register(NAME, attention)
