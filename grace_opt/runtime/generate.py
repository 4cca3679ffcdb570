"""Generate with a full or a pruned cache, and compare the two token by token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from grace_opt.compression.plan import CachePlan
from grace_opt.errors import InputError
from grace_opt.models.config import context_of
from grace_opt.models.inputs import input_device, require_rows

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

    Returns a record with ``text`` (the continuation), ``prompt_tokens``, ``new_tokens``, ``unused_settings`` (names of
    generation settings that the model comes with and that have no effect on this way to decode), ``seconds`` (prefill
    included), ``tokens`` (that the cache holds), ``cache_bytes`` (counted on its tensors), ``full_cache_bytes`` (of a
    plain cache of as many tokens in the same dtype) and ``pays_from`` (as of `PrunedCache`). Raises InputError for an
    empty prompt or one that does not fit the context.
    """
    import torch

    from grace_opt.runtime import PrunedCache, cache_nbytes, full_cache_nbytes

    check_lengths(max_new_tokens, num_beams)
    inputs = tokenizer(prompt, return_tensors="pt").to(input_device(model))
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise InputError("the prompt is empty; give at least one word")
    require_rows(model, inputs["input_ids"][0].tolist())
    check_context(model, length, max_new_tokens)
    unused, instead = _unused_settings(model, num_beams)
    if getattr(model.generation_config, "stop_strings", None):
        instead["tokenizer"] = tokenizer
    past = plain_cache(model) if past is None else past
    began = time.perf_counter()
    with torch.inference_mode():
        ids = cast(Any, model).generate(
            **inputs,
            **instead,
            past_key_values=past,
            use_cache=True,
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
        "unused_settings": unused,
        "seconds": seconds,
        "tokens": past.get_seq_length(),
        "cache_bytes": cache_nbytes(past),
        "full_cache_bytes": full_cache_nbytes(past),
        "pays_from": past.pays_from if isinstance(past, PrunedCache) else None,
    }


# Settings of a model that are honoured: what ends a text, and what changes the scores of tokens.
_HONOURED = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "stop_strings", "max_time"),
    *("min_length", "min_new_tokens", "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens"),
    *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "remove_invalid_values"),
    *("renormalize_logits", "token_healing", "watermarking_config"),
)
_OF_BEAMS = ("early_stopping", "length_penalty")
_ARGUMENTS = ("do_sample", "num_beams", "max_length", "max_new_tokens", "use_cache")  # we give these ourselves


def _unused_settings(model: PreTrainedModel, num_beams: int) -> tuple[list[str], dict[str, Any]]:
    """Which of the model's generation settings are not used, and what to give to ``generate`` in their place."""
    from transformers import GenerationConfig

    neutral = {**GenerationConfig._get_default_generation_params()}
    given = {
        name: value
        for name, value in model.generation_config.to_diff_dict().items()
        if not name.startswith("_") and name != "transformers_version"
        if value is not None and value != neutral.get(name)
    }
    ours = _ARGUMENTS + _HONOURED + (_OF_BEAMS if num_beams > 1 else ())
    unused = [name for name in given if name not in ours]
    said = unused + [name for name in given if name == "do_sample"]
    plain = GenerationConfig()  # type: ignore[no-untyped-call]
    return sorted(said), {name: neutral.get(name, getattr(plain, name)) for name in unused if hasattr(plain, name)}


def check_lengths(max_new_tokens: int, num_beams: int) -> None:
    """Raise InputError for numbers that no model could generate by."""
    if max_new_tokens < 1 or num_beams < 1:
        raise InputError(f"max_new_tokens and num_beams must be at least 1, got {max_new_tokens} and {num_beams}")


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
    *,
    narrow: bool = False,
) -> tuple[Forced, Tensor]:
    """Prefill ``prompt`` int64[1, T], ``narrow`` or whole, and decode one token at a time, on one cache.

    ``tokens`` int64[n] are fed whatever the model predicts (teacher forcing); a number n instead decodes greedily.
    Returns the run and the n tokens.
    """
    import torch

    from grace_opt.runtime import PrunedCache, cache, cache_nbytes
    from grace_opt.runtime.narrow import prefill_narrow

    past = plain_cache(model) if plan is None else cache(plan, model)
    given = None if isinstance(tokens, int) else tokens
    count = tokens if isinstance(tokens, int) else len(tokens)
    used, logits = [], []
    with torch.inference_mode():
        began = time.perf_counter()
        if narrow and isinstance(past, PrunedCache):
            row = prefill_narrow(model, past, prompt, prompt.shape[1]).logits[0, -1].float()
        else:
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
    longest = context_of(model.config)
    if longest and prompt_tokens + new_tokens > longest:
        raise InputError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones do not fit the model's context of {longest}; "
            "shorten the prompt or generate fewer"
        )
