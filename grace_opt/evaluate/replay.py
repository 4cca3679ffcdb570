"""A captured prompt replayed into real caches, and what follows it scored under them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
from grace_opt.runtime.together import decodes_together, step_together

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


@dataclass
class Decoding:
    """A cache of one row, and what is decoded on it.

    Attributes:
        following: int64[1, c], read on the cache first.
        most: tokens are decoded at the most.
        stop: asked after each token with all of them so far.
        tokens: those that were decoded.
    """

    past: Any
    following: Tensor
    most: int
    stop: Callable[[list[int]], bool] = lambda _: False
    tokens: list[int] = field(default_factory=list)

    @property
    def last(self) -> int:
        """The token that is read next."""
        return self.tokens[-1] if self.tokens else int(self.following[0, -1])

    def take(self, logits: Tensor) -> bool:
        """The likeliest token of [vocabulary] comes next; returns whether more are wanted."""
        self.tokens.append(int(logits.argmax()))
        return len(self.tokens) < self.most and not self.stop(self.tokens)


def decode(model: PreTrainedModel, rows: Sequence[Decoding]) -> None:
    """Decode greedily on every row's cache, all rows in one pass a token where the model can (`decodes_together`)."""
    for row in rows:
        if row.following.shape[1] > 1:
            _last_logits(model, row.past, row.following[:, :-1])
    going = list(rows)
    side_by_side = decodes_together(model, [row.past for row in rows])
    while going:
        if len(going) > 1 and side_by_side:
            logits = step_together(model, [row.past for row in going], [row.last for row in going])
        else:
            tokens = [row.following.new_tensor([[row.last]]) for row in going]
            logits = torch.stack(
                [_last_logits(model, row.past, token) for row, token in zip(going, tokens, strict=True)]
            )
        going = [row for row, each in zip(going, logits, strict=True) if row.take(each)]


def _last_logits(model: PreTrainedModel, past: Any, ids: Tensor) -> Tensor:
    """The logits [vocabulary] after the last of the tokens int64[1, ..]."""
    only_last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    *_, logits = _logits(model, past, ids, CHUNK, **only_last)
    return logits[-1]


def _logits(model: PreTrainedModel, past: Any, ids: Tensor, chunk: int, **how: Any) -> Iterator[Tensor]:
    """The logits [c, vocabulary] after each of the tokens int64[1, ..], in chunks."""
    low = 0
    with torch.inference_mode():
        while low < ids.shape[1]:
            part = ids[:, low : low + min([chunk, *unbroken(past)])]
            yield model(input_ids=part, past_key_values=past, use_cache=True, **how).logits[0]
            low += part.shape[1]
