"""Run a prompt once, keep what its attention saw, and score what follows under any number of compressed caches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grace_opt.compression.headmaps import Compression, HeadMap
from grace_opt.errors import InputError
from grace_opt.graphs.observed import Observed, output_projection
from grace_opt.runtime.attention import attending_with, observing, require_attention_interface

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BLOCK = 1 << 25  # elements of the scores of one block of queries


@dataclass
class Prefill:
    """The uncompressed cache of a prompt, and what each full-attention layer saw of its last queries."""

    model: PreTrainedModel
    ids: Tensor  #: int64[1, prefix + scored]
    prefix: int
    past: Any  #: transformers' DynamicCache of the prefix
    queries: dict[int, Tensor]  #: layer -> [Hq, w, n], the last queries of the prefix
    scaling: dict[int, float]
    outputs: dict[int, Tensor | None]
    seconds: float
    _observed: dict[tuple[int, int, int, int | None], dict[int, Observed]] = field(default_factory=dict)

    def observed(
        self, observation_window: int, recent_window: int, sinks: int, spans: int | None = None
    ) -> dict[int, Observed]:
        """For `grace_opt.compression.method.compress`. Raises InputError if the prefix is shorter than its windows."""
        seen = self._observed.setdefault((observation_window, recent_window, sinks, spans), {})
        for layer, queries in () if seen else self.queries.items():
            keys, values = self.past.layers[layer].keys[0], self.past.layers[layer].values[0]
            seen[layer] = Observed(
                queries[:, -observation_window:],
                keys,
                values,
                self.scaling[layer],
                sinks,
                recent_window,
                self.outputs[layer],
                spans,
            )
        return seen


def prefill(model: PreTrainedModel, ids: Sequence[int], prefix: int, observation_window: int) -> Prefill:
    """Run the first ``prefix`` of ``ids`` through the model's body.

    Raises InputError for a model whose attention cannot be observed, or all of whose layers have sliding windows.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    require_attention_interface(model)
    queries: dict[int, Tensor] = {}
    scaling: dict[int, float] = {}
    outputs: dict[int, Tensor | None] = {}

    def keep(module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, arguments: dict[str, Any]) -> None:
        if arguments.get("sliding_window") is not None:
            return
        queries[module.layer_idx] = query[0, :, -observation_window:].clone()
        scaling[module.layer_idx] = scale
        outputs[module.layer_idx] = output_projection(module, query.shape[1])

    row = torch.tensor([list(ids)], device=model.device)
    past = DynamicCache(config=model.config.get_text_config(decoder=True))
    began = time.perf_counter()
    with torch.inference_mode(), attending_with(model, observing(keep)):
        model.base_model(input_ids=row[:, :prefix], past_key_values=past, use_cache=True)
    seconds = time.perf_counter() - began
    for layer in [layer for layer in queries if type(past.layers[layer]) is not DynamicLayer]:
        del queries[layer]  # a sliding or chunked window: its cache is short already, and stays as it is
    if not queries:
        raise InputError(
            f"{type(model).__name__} has no layer that attends to all tokens; the caches of its sliding windows are "
            "short already, and compressing them is not supported"
        )
    return Prefill(model, row, prefix, past, queries, scaling, outputs, seconds)


def log_probabilities(
    state: Prefill, compression: Compression | None, *, prune_generated: bool = False, chunk: int = 256
) -> Iterator[Tensor]:
    """Log-probabilities float32[c, vocabulary] that follow each token after the prefix, given all tokens up to it.

    The scored tokens go in chunks; each query sees the cache as decoding token by token would leave it. Under a
    compression the prompt's old tokens are read as stored; the scored tokens stay whole, as ThinK and GRACE keep them,
    or with ``prune_generated`` are pruned as they leave the recent window. None: the uncompressed cache. Exhaust it
    before the next one of this state.
    """
    with torch.inference_mode(), _continued(state, compression, prune_generated):
        for low in range(state.prefix, state.ids.shape[1], chunk):
            part = state.ids[:, low : low + chunk]
            logits = state.model(input_ids=part, past_key_values=state.past, use_cache=True).logits[0]
            yield logits.float().log_softmax(-1)


def greedy_tokens(state: Prefill, compression: Compression | None, count: int) -> list[int]:
    """``count`` tokens decoded greedily after all of the state's ids, under a compressed cache of its prefix."""
    tokens: list[int] = []
    with torch.inference_mode(), _continued(state, compression, prune_generated=False):
        part = state.ids[:, state.prefix :]
        for _ in range(count):
            logits = state.model(input_ids=part, past_key_values=state.past, use_cache=True).logits
            part = logits[:, -1:].argmax(-1)
            tokens.append(int(part))
    return tokens


@contextmanager
def _continued(state: Prefill, compression: Compression | None, prune_generated: bool) -> Iterator[None]:
    """The cache goes on from the prefix, read through a compression, and is put back afterwards."""
    reader = None if compression is None else _Reader(compression, None if prune_generated else state.prefix)
    before = [dict(vars(layer)) for layer in state.past.layers]  # updates replace tensors, and write into none
    try:
        with attending_with(state.model, partial(_scoring, reader)):
            yield
    finally:
        for layer, held in zip(state.past.layers, before, strict=True):
            vars(layer).clear()
            vars(layer).update(held)


@dataclass
class _Reader:
    """What the attention function reads the cache through."""

    compression: Compression
    prefix: int | None  #: tokens from here on are never pruned; None: all are once they leave the recent window
    prompt: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  #: as read, by layer; needs a prefix

    def whole(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [H, T, n] and values [H, T, nv] that all queries after the prefix see, by tokens: those that see the
        prompt's old tokens as stored and all others whole.
        """
        assert self.prefix is not None
        maps, sinks = self.compression.layers[layer], self.compression.sinks
        old = slice(sinks, max(sinks, self.prefix - self.compression.recent_window))
        if layer not in self.prompt:
            self.prompt[layer] = (
                _between(maps.heads.get("key"), keys, old, maps.hidden),
                _between(maps.heads.get("value"), values, old, maps.hidden),
            )
        first = self.prompt[layer]
        return torch.cat([first[0], keys[:, old.stop :]], 1), torch.cat([first[1], values[:, old.stop :]], 1)

    def pruned(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values as they are read once they are old."""
        maps, rest = self.compression.layers[layer], slice(self.compression.sinks, keys.shape[1])
        return _between(maps.heads.get("key"), keys, rest), _between(maps.heads.get("value"), values, rest)


def _between(maps: Sequence[HeadMap] | None, x: Tensor, old: slice, hidden: bool = False) -> Tensor:
    """Tokens [H, T, n] up to the end of ``old``; those in it are left out, or as stored and read back by the maps."""
    if hidden:
        return x[:, : old.start]
    if maps is None:
        return x[:, : old.stop]
    read = torch.stack([each.read(each.store(head)) for each, head in zip(maps, x[:, old], strict=True)])
    return torch.cat([x[:, : old.start], read], 1)


def _scoring(
    reader: _Reader | None,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if reader is None or module.layer_idx not in reader.compression.layers:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **more)
    if reader.prefix is None:
        return _scoring_pruned(reader, module.layer_idx, query, key[0], value[0], scaling), None
    keys, values = reader.whole(module.layer_idx, key[0], value[0])
    if mask is not None:  # tokens may be hidden between the sinks and the rest, all of which this mask's rows see
        mask = mask[..., mask.shape[-1] - keys.shape[1] :]
    elif query.shape[2] > 1:
        mask = torch.ones(query.shape[2], keys.shape[1], dtype=torch.bool, device=query.device)
        mask = mask.tril(keys.shape[1] - query.shape[2])
    return sdpa_attention_forward(module, query, keys[None], values[None], mask, scaling=scaling, **more)


def _scoring_pruned(
    reader: _Reader, layer: int, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None
) -> Tensor:
    """Attention where each query has a recent window of its own. query [1, Hq, c, n] -> [1, c, Hq, nv]."""
    compression = reader.compression
    heads, tokens = keys.shape[:2]
    new = query.shape[2]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    read_keys, read_values = reader.pruned(layer, keys, values)
    position = torch.arange(tokens, device=query.device)
    grouped = (query[0] * scale).reshape(heads, -1, new, query.shape[-1])
    parts = []
    step = max(1, _BLOCK // (query.shape[1] * tokens))
    for low in range(0, new, step):
        q = grouped[:, :, low : low + step]
        at = position[tokens - new + low : tokens - new + low + q.shape[2], None]
        whole = (at - position < compression.recent_window) | (position < compression.sinks)
        flat = q.reshape(heads, -1, q.shape[-1])
        shape = (heads, -1, q.shape[2], tokens)
        scores = torch.matmul(flat, keys.mT).view(shape)
        if compression.layers[layer].hidden:
            scores = scores.masked_fill(~whole, -torch.inf)
        else:
            scores = torch.where(whole, scores, torch.matmul(flat, read_keys.mT).view(shape))
        weights = scores.masked_fill(position > at, -torch.inf).softmax(-1, dtype=torch.float32).to(values.dtype)
        if "value" not in compression.layers[layer].heads:
            part = torch.matmul(weights.view(heads, -1, tokens), values)
        else:
            part = torch.matmul((weights * whole).view(heads, -1, tokens), values)
            part += torch.matmul((weights * ~whole).view(heads, -1, tokens), read_values)
        parts.append(part.view(heads, -1, q.shape[2], values.shape[-1]))
    out = torch.cat(parts, dim=2).reshape(1, query.shape[1], new, -1)
    return out.transpose(1, 2).contiguous()
