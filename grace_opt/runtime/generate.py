"""Generate with a full or a pruned cache, and compare the two token by token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from grace_opt.compression.plan import CachePlan
from grace_opt.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache


def plain_cache(model: PreTrainedModel) -> Cache:
    """transformers' own."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=model.config.get_text_config(decoder=True))


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    past: Cache | None = None,
    *,
    max_new_tokens: int = 64,
    num_beams: int = 1,
) -> dict[str, Any]:
    """Continue a prompt greedily (or with beams) on an empty cache, transformers' own if None, and say what it cost.

    Returns a record with ``text`` (the continuation), ``new_tokens``, ``seconds`` (prefill included), ``tokens`` (that
    the cache holds), ``cache_bytes`` (counted on its tensors) and ``full_cache_bytes`` (of a plain cache of as many
    tokens in the same dtype). Raises InputError for an empty prompt or one that does not fit the context.
    """
    import torch

    from grace_opt.runtime import cache_nbytes, full_cache_nbytes

    if max_new_tokens < 1 or num_beams < 1:
        raise InputError(f"max_new_tokens and num_beams must be at least 1, got {max_new_tokens} and {num_beams}")
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise InputError("the prompt is empty; give at least one word")
    check_context(model, length, max_new_tokens)
    past = plain_cache(model) if past is None else past
    began = time.perf_counter()
    with torch.inference_mode():
        ids = cast(Any, model).generate(
            **inputs,
            past_key_values=past,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    seconds = time.perf_counter() - began
    return {
        "text": tokenizer.decode(ids[0, length:], skip_special_tokens=True),
        "prompt_tokens": length,
        "new_tokens": ids.shape[1] - length,
        "seconds": seconds,
        "tokens": past.get_seq_length(),
        "cache_bytes": cache_nbytes(past),
        "full_cache_bytes": full_cache_nbytes(past),
    }


@dataclass(frozen=True)
class Forced:
    """A run over given tokens. ``logits`` float32[n, vocabulary]: the prediction of each of the n tokens."""

    logits: Tensor
    cache_bytes: int
    prefill_seconds: float
    decode_seconds: float


def forced(
    model: PreTrainedModel,
    prompt: Tensor,
    tokens: Tensor | int,
    plan: CachePlan | None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Forced, Tensor]:
    """Prefill ``prompt`` int64[1, T] and decode one token at a time, on one cache.

    ``tokens`` int64[n] are fed whatever the model predicts (teacher forcing); a number n instead decodes greedily.
    Returns the run and the n tokens.
    """
    import torch

    from grace_opt.runtime import PrunedCache, cache, cache_nbytes

    past = plain_cache(model) if plan is None else cache(plan, model)
    given = None if isinstance(tokens, int) else tokens
    count = tokens if isinstance(tokens, int) else len(tokens)
    used, logits = [], []
    with torch.inference_mode():
        began = time.perf_counter()
        row = model(input_ids=prompt, past_key_values=past, logits_to_keep=1).logits[0, -1].float()
        prefilled = time.perf_counter()
        for step in range(count):
            logits.append(row)
            used.append(row.argmax() if given is None else given[step])
            if progress is not None:
                progress(step + 1)
            if step + 1 < count:
                row = model(input_ids=used[-1].view(1, 1), past_key_values=past).logits[0, -1].float()
        ended = time.perf_counter()
    run = Forced(torch.stack(logits), cache_nbytes(past), prefilled - began, ended - prefilled)
    if isinstance(past, PrunedCache):
        past.release()
    return run, torch.stack(used)


def kl_per_token(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) in nats, float64[n], of two float32[n, vocabulary] sets of logits."""
    import torch

    log_p = torch.log_softmax(reference.double(), -1)
    log_q = torch.log_softmax(other.double(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def check_context(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> None:
    """Raise InputError if prompt and new tokens do not fit the model's context."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest and prompt_tokens + new_tokens > longest:
        raise InputError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones do not fit the model's context of {longest}; "
            "shorten the prompt or generate fewer"
        )
