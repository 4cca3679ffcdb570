"""A captured prompt replayed into real caches, and what follows it scored under them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grace_opt.compression.mask import KVMask
from grace_opt.compression.plan import CachePlan
from grace_opt.errors import InputError
from grace_opt.evaluate.capture import Captured
from grace_opt.runtime.cache import PrunedCache, cache
from grace_opt.runtime.layer import PrunedLayer
from grace_opt.runtime.narrow import prefill_narrow, unbroken
from grace_opt.runtime.ragged import RaggedLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


def log_probabilities(captured: Captured, past: Any, *, chunk: int = CHUNK) -> Iterator[Tensor]:
    """Log-probabilities float32[c, vocabulary] that follow each token after the prefix, given all tokens up to it.

    The scored tokens go in chunks; each query sees the cache as decoding token by token would leave it. ``past`` is
    `replay`'s or `dense`'s, and goes on.
    """
    for logits in _logits(captured.model, past, captured.ids[:, captured.prefix :], chunk):
        yield logits.float().log_softmax(-1)


def greedy_tokens(
    model: PreTrainedModel, past: Any, following: Tensor, most: int, stop: Callable[[list[int]], bool] = lambda _: False
) -> list[int]:
    """Up to ``most`` tokens decoded greedily after ``following`` int64[1, c], on a cache of what comes before.

    ``stop``: asked after each token with all of them so far.
    """
    tokens: list[int] = []
    part = following
    while len(tokens) < most:
        *_, logits = _logits(model, past, part, CHUNK)
        tokens.append(int(logits[-1].argmax()))
        if stop(tokens):
            break
        part = following.new_tensor([tokens[-1:]])
    return tokens


def _logits(model: PreTrainedModel, past: Any, ids: Tensor, chunk: int) -> Iterator[Tensor]:
    """The logits [c, vocabulary] after each of the tokens int64[1, ..], in chunks."""
    low = 0
    with torch.inference_mode():
        while low < ids.shape[1]:
            part = ids[:, low : low + min([chunk, *unbroken(past)])]
            yield model(input_ids=part, past_key_values=past, use_cache=True).logits[0]
            low += part.shape[1]
