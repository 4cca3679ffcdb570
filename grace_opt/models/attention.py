"""Replacing a model's attention for a while: to watch it, or to read a compressed cache. Its code is not touched.

What is switched is a name in the model's configurations, which all threads see. So the function behind the name asks at
each call whose turn it is: keys of a compressed cache, a model that this thread watches, or else whatever the model had
before, so that others use the same model meanwhile and notice nothing.
"""

from __future__ import annotations

import inspect
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from grace_opt.errors import InputError
from grace_opt.models.config import stated, text_config

if TYPE_CHECKING:
    from typing import Self

NAME = "grace_opt"  #: the attention that reads compressed caches; grace_opt.runtime registers it
_ANY = "grace_opt_any"
_OURS = (NAME, _ANY)
PREFIXES = (
    "PEFT's prefix tuning puts a cache of its own in place of an empty one, so nothing would be compressed; use the "
    "model without its prefix, or another kind of adapter"
)
_HARMLESS = ("position_ids", "cache_position")  # tensors that only say where the queries are


# ---------------------------------------------------------------- what is switched, and by whom


class _Switched(str):
    """A name of ours in a configuration, with what was there ``before``. A copy of the configuration gets that back."""

    before: str

    def __new__(cls, name: str, before: str) -> Self:
        switched = super().__new__(cls, name)
        switched.before = before
        return switched

    def __deepcopy__(self, memo: object) -> str:
        return self.before

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self.before,)


@dataclass
class _Held:
    """A configuration that is switched, and who asked for which name."""

    config: Any
    before: str
    asked: list[tuple[object, str]]


_held: dict[int, _Held] = {}  # by the id of the configuration, which is held: two models may share one
_ended: deque[object] = deque()  # who wants to be taken back
_lock = threading.Lock()


def switch(model: PreTrainedModel, name: str) -> Callable[[], None]:
    """Set a model's attention implementation; returns what takes that back.

    Several may be set at a time, also by several threads: the last one that was not taken back counts, and when all
    are, the model has what it had before the first. What somebody else has set meanwhile is left alone.
    """
    ticket = object()
    with _lock:
        for config in _configurations(model):
            before = _before(config)
            held = _held.setdefault(id(config), _Held(config, before, []))
            held.before = before
            held.asked.append((ticket, name))
            config._attn_implementation_internal = _Switched(name, held.before)
    _settle()

    def back() -> None:
        _ended.append(ticket)
        _settle()

    return back


def _settle() -> None:
    """Take back those that ended. Never waits: the garbage collector may call it while this thread has the lock."""
    while _ended and _lock.acquire(blocking=False):
        try:
            while _ended:
                _take_back(_ended.popleft())
        finally:
            _lock.release()


def _take_back(ticket: object) -> None:
    for key, held in list(_held.items()):
        left = [entry for entry in held.asked if entry[0] is not ticket]
        if len(left) == len(held.asked):
            continue
        held.asked = left
        if held.config._attn_implementation in _OURS:
            held.config._attn_implementation_internal = _Switched(left[-1][1], held.before) if left else held.before
        if not left:
            del _held[key]


def _configurations(model: torch.nn.Module) -> list[Any]:
    """Every configuration that the model's attention asks, each once."""
    found: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module._can_set_attn_implementation():
            found[id(module.config)] = module.config
    return list(found.values())


# ---------------------------------------------------------------- whose turn it is


@dataclass(frozen=True)
class _Watching:
    """What a thread does with the attention of the modules of one model."""

    function: Callable[..., Any]
    modules: frozenset[int]
    configs: frozenset[int]


# A context variable, not a module global: two threads may run two models, or one, at once.
_watching: ContextVar[_Watching | None] = ContextVar("grace_opt_watching", default=None)


class Ours(int):
    """The offset of a cache of ours, in what it says of masks: they are made as SDPA wants them."""


@contextmanager
def attending_with(model: PreTrainedModel, function: Callable[..., Any]) -> Iterator[None]:
    """Route this thread's runs of the model through a function with transformers' signature, and back when done."""
    modules = frozenset(map(id, model.modules()))
    watching = _Watching(function, modules, frozenset(map(id, _configurations(model))))
    token = _watching.set(watching)
    back = switch(model, _ANY)
    try:
        yield
    finally:
        back()
        _watching.reset(token)


def ordinary(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    """Attention over keys that are not compressed: by who watches the model, or else as the model did before."""
    if torch.compiler.is_compiling():  # which can follow neither a context variable nor what was before
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    watching = _watching.get()
    if watching is not None and id(module) in watching.modules:
        return watching.function(module, query, key, value, attention_mask, **kwargs)
    before = _before(getattr(module, "config", None))
    like_sdpa = isinstance(attention_mask, Tensor) and attention_mask.dim() == 4 and attention_mask.dtype == torch.bool
    if like_sdpa or (attention_mask is None and before in ("eager", "flex_attention")):
        # A layer that stays whole in a cache of ours: its mask was made for SDPA.
        if before != "sdpa":
            refuse_unsupported(kwargs)
        before = "sdpa"
    function = _eager(module) if before == "eager" else AttentionInterface._global_mapping[before]
    return function(module, query, key, value, attention_mask, **kwargs)


def _any(module: torch.nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    attend = ordinary if isinstance(key, Tensor) else AttentionInterface._global_mapping[NAME]
    return attend(module, query, key, value, attention_mask, **kwargs)


def _masks(*sizes: Any, config: Any = None, kv_offset: Any = 0, **kwargs: Any) -> Any:
    """The mask of a pass: SDPA's for our attention, and what the model had before for others."""
    make: Any = sdpa_mask
    if not torch.compiler.is_compiling() and not isinstance(kv_offset, Ours):
        watching = _watching.get()
        if watching is None or id(config) not in watching.configs:
            make = AttentionMaskInterface._global_mapping.get(_before(config))
    return None if make is None else make(*sizes, config=config, kv_offset=kv_offset, **kwargs)


def _before(config: Any) -> str:
    """What a configuration had before it was switched; what it has, if that was taken back just now."""
    now = getattr(config, "_attn_implementation", None)
    if isinstance(now, _Switched):
        return now.before
    if now in _OURS:  # set by hand
        return _held[id(config)].before if id(config) in _held else "sdpa"
    return "sdpa" if now is None else str(now)


def _eager(module: torch.nn.Module) -> Any:
    """The eager attention that the module itself falls back on."""
    return inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward", sdpa_attention_forward)


def register(name: str, function: Callable[..., Any]) -> None:
    """Make an attention function known to transformers, with SDPA's masks (without them, padding is ignored)."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, _masks if name in _OURS else sdpa_mask)


# ---------------------------------------------------------------- what can be watched and replaced


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


def require_attention_interface(model: PreTrainedModel) -> None:
    """Raise InputError, in a sentence, if the model's attention cannot be replaced."""
    name = type(model).__name__
    config = text_config(model.config)
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"{name} is an encoder-decoder model; only decoder-only models are supported")
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "peft_type", None) in ("PREFIX_TUNING", "CARTRIDGE"):
        raise InputError(PREFIXES)
    if stated(config, "kv_lora_rank"):
        raise InputError(f"{name} uses multi-head latent attention, which caches no key channels to prune")
    if not model._can_set_attn_implementation():
        raise InputError(
            f"{name} does not use transformers' attention interface, so its attention can be neither observed "
            "nor replaced; use a model that does"
        )


register(_ANY, _any)
