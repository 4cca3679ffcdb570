"""A captured prompt replayed into real caches, and what follows it scored under them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from grace_opt.compression.mask import KVMask
from grace_opt.compression.plan import CachePlan
from grace_opt.errors import InputError
from grace_opt.evaluate.capture import Captured
from grace_opt.runtime.cache import PrunedCache, cache
from grace_opt.runtime.layer import PrunedLayer
from grace_opt.runtime.narrow import prefill_narrow, unbroken
from grace_opt.runtime.ragged import RaggedLayer

CHUNK = 256  # tokens that are scored in one pass


def replay(captured: Captured, plan: CachePlan | KVMask) -> PrunedCache:
    """The cache that the model would have after the prompt, had it run on an empty one of this plan.

    Its compressed layers are made of the captured queries, keys and values, by the code that runs in generation; the
    others share the captured tensors. Raises InputError for a plan of another model, or a layer that was not captured.
    """
    past = cache(plan, captured.model)
    try:
        for index, (layer, held) in enumerate(zip(past.layers, captured.past.layers, strict=True)):
            if not isinstance(layer, PrunedLayer | RaggedLayer):
                past.layers[index] = copy.copy(held)  # updates replace tensors, and write into none
                continue
            if index not in captured.queries:
                raise InputError(
                    f"the mask prunes layer {index}, whose cache this model keeps in a way that cannot be pruned"
                )
            layer.update(held.keys, held.values)
            query = captured.queries[index][None]
            layer.begin(query, captured.scaling[index], None, captured.outputs[index])
            layer.done()
            layer.stepwise = True
    except BaseException:
        past.release()
        raise
    return past


def narrow(captured: Captured, plan: CachePlan | KVMask) -> PrunedCache:
    """The cache after the prompt where it is computed on what is stored, each query with its own window (`prefill`)."""
    past = cache(plan, captured.model)
    try:
        with torch.inference_mode():
            prefill_narrow(captured.model.base_model, past, captured.ids[:, : captured.prefix], CHUNK)
    except BaseException:
        past.release()
        raise
    return past


def dense(captured: Captured) -> Any:
    """The uncompressed cache after the prompt; the captured one stays as it is."""
    past = DynamicCache(config=captured.model.config.get_text_config(decoder=True))
    past.layers = [copy.copy(layer) for layer in captured.past.layers]
    return past


def log_probabilities(captured: Captured, past: Any, *, chunk: int = CHUNK) -> Iterator[Tensor]:
    """Log-probabilities float32[c, vocabulary] that follow each token after the prefix, given all tokens up to it.

    The scored tokens go in chunks; each query sees the cache as decoding token by token would leave it. ``past`` is
    `replay`'s or `dense`'s, and goes on.
    """
    with torch.inference_mode():
        low = captured.prefix
        while low < captured.ids.shape[1]:
            count = min([chunk, *unbroken(past)])
            part = captured.ids[:, low : low + count]
            logits = captured.model(input_ids=part, past_key_values=past, use_cache=True).logits[0]
            yield logits.float().log_softmax(-1)
            low += count


def greedy_tokens(captured: Captured, past: Any, count: int) -> list[int]:
    """``count`` tokens decoded greedily after all of the captured ids, on a cache of the prefix."""
    tokens: list[int] = []
    with torch.inference_mode():
        part = captured.ids[:, captured.prefix :]
        for _ in range(count):
            logits = captured.model(input_ids=part, past_key_values=past, use_cache=True).logits
            part = logits[:, -1:].argmax(-1)
            tokens.append(int(part))
    return tokens
