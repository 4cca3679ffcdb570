"""Replacing a model's attention for a while: to watch it, or to read a compressed cache. Its code is not touched."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from grace_opt.errors import InputError
from grace_opt.models.config import stated, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "grace_opt"  #: the attention that reads compressed caches; grace_opt.runtime registers it
_ANY = "grace_opt_any"
_HARMLESS = ("position_ids", "cache_position")  # tensors that only say where the queries are
# A context variable, not a module global: two threads may run two models at once.
_function: ContextVar[Callable[..., Any]] = ContextVar("grace_opt_attention_function")

_lock = threading.RLock()  # the garbage collector may take something back in the middle of a switch
_switched: WeakKeyDictionary[Any, list[tuple[object, str]]] = WeakKeyDictionary()  # who asked for what
_before: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # model -> what it had before the first


def switch(model: PreTrainedModel, name: str) -> Callable[[], None]:
    """Set a model's attention implementation; returns what takes that back.

    Several may be set at a time: the last one that was not taken back counts, and when all are, the model has what it
    had before the first. What somebody else has set meanwhile is left alone.
    """
    ticket = object()
    with _lock:
        asked = _switched.setdefault(model, [])
        if not asked:
            _before[model] = model.config._attn_implementation
        asked.append((ticket, name))
        model.set_attn_implementation(name)

    def back() -> None:
        with _lock:
            asked = _switched.get(model, [])
            if all(each is not ticket for each, _ in asked):
                return
            ours = {each for _, each in asked}
            asked[:] = [entry for entry in asked if entry[0] is not ticket]
            if model.config._attn_implementation in ours:
                model.set_attn_implementation(asked[-1][1] if asked else _before[model])

    return back


def refuse_unsupported(kwargs: Mapping[str, Any]) -> None:
    """Raise InputError for what SDPA would silently leave out, or scores of a compressed cache would get wrong."""
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
    token = _function.set(function)
    back = switch(model, _ANY)
    try:
        yield
    finally:
        back()
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


register(_ANY, _any)
