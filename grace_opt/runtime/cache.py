"""The compressed cache of a whole model."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache

import grace_opt.runtime.attention  # noqa: F401  (registers the attention function)
from grace_opt.compression.apply import online
from grace_opt.compression.budget import Budget
from grace_opt.compression.integers import without_integers
from grace_opt.compression.mask import KVMask
from grace_opt.compression.mask_file import load_mask
from grace_opt.compression.method import Method
from grace_opt.compression.method import method as named
from grace_opt.compression.pays import pays_from
from grace_opt.compression.plan import CachePlan, LayerPlan
from grace_opt.compression.plugins import CODECS
from grace_opt.errors import InputError
from grace_opt.heads import KINDS
from grace_opt.models.attention import NAME, PREFIXES, Ours, require_attention_interface, switch
from grace_opt.models.config import text_config
from grace_opt.models.given import Given
from grace_opt.models.rotary import Turn, rotary_of
from grace_opt.runtime.kernels.choose import check_name
from grace_opt.runtime.layer import PrunedLayer
from grace_opt.runtime.ragged import RaggedLayer
from grace_opt.runtime.static import StaticPrunedLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PrunedCache(Cache):
    """A transformers ``Cache`` whose layers execute a `CachePlan`. Made by `cache` and `online_cache`.

    While it is in use the model's attention implementation is ``grace_opt``. That is SDPA in the layers of this cache
    that stay whole, and what was there before for whoever runs the model without such a cache, in this thread or
    another. `release`, the end of a ``with`` block, or the end of the cache itself sets back what was there before.
    """

    plan: CachePlan
    _model: weakref.ref[Any]
    _release: Callable[[], object]
    _look: Callable[[], object] | None = None  # ends looking at what projections are given

    def __deepcopy__(self, memo: dict[int, Any]) -> PrunedCache:
        copied = PrunedCache(layers=copy.deepcopy(self.layers, memo))
        model = self._model()
        if model is not None:
            copied._use(self.plan, model)
        return copied

    def _use(self, plan: CachePlan, model: PreTrainedModel) -> None:
        self.plan, self._model = plan, weakref.ref(model)
        self._release = weakref.finalize(self, switch(model, NAME))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """The cache goes out of use: the model gets back the attention implementation that it had."""
        self._release()
        if self._look is not None:
            self._look()

    def get_mask_sizes(self, *arguments: Any, **more: Any) -> tuple[int, int]:
        """As of ``Cache``; the offset tells the mask's maker whose cache this is."""
        length, offset = super().get_mask_sizes(*arguments, **more)
        return length, offset if torch.compiler.is_compiling() else Ours(offset)

    @property
    def max_cache_len(self) -> int:
        """Not known. Raises InputError: PEFT asks it in order to start a cache of its own in place of this one."""
        raise InputError(PREFIXES)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held for tokens."""
        return cache_nbytes(self)

    @property
    def pays_from(self) -> int | None:
        """How many tokens a prompt must have for this cache to take fewer bytes than a full one.

        None if that never is so, if it cannot be told (`grace_opt.compression.pays`), or before the first tokens.
        """
        layers = {each.index: each for each in self.layers if isinstance(each, PrunedLayer | RaggedLayer)}
        if not layers or not all(each.is_initialized for each in layers.values()):
            return None
        itemsize = next(iter(layers.values())).dtype.itemsize
        return pays_from(self.plan.layers, {i: each.shapes for i, each in layers.items()}, itemsize)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -``tokens_to_remove`` tokens, in all layers or in none.

        Raises InputError if a layer cannot: it can as many as its recent window has, at most 32.
        """
        for layer in self.layers:
            if isinstance(layer, PrunedLayer | RaggedLayer):
                layer.removable(tokens_to_remove)
        super().crop(tokens_to_remove)


def cache(
    mask: CachePlan | KVMask | str | Path,
    model: PreTrainedModel,
    *,
    max_length: int | None = None,
    key_bits: int | None = None,
    value_bits: int | None = None,
    generated: Literal["keep", "prune"] | None = None,
    offload: bool = False,
    kernel: str | None = None,
) -> PrunedCache:
    """A new, empty cache for ``model(..., past_key_values=...)`` and ``model.generate``.

    Layers that the plan leaves out, and the sliding-window layers of a mixed model, get transformers' own cache layer.

    Args:
        mask: a folder, a `KVMask` or a `CachePlan`. It says everything; the other arguments override parts of it.
        max_length: preallocate for so many tokens, for torch.compile and CUDA graphs; None: grow as tokens come.
        key_bits: hold the rows of old keys as integers of 2, 3, 4 or 8 bits (0: as they are), whatever the mask says.
        value_bits: the same of values.
        generated: ``prune`` generated tokens as they leave the recent window, or ``keep`` them whole.
        offload: keep each layer's tensors on the CPU but while it attends.
        kernel: ``cpu``, ``triton`` or ``plain``, to decode with no other; None: the best that can (docs/cache.md).

    Raises:
        InputError: for a mask of another model, a mask that this runtime cannot execute (pruned prefill), a model whose
            attention cannot be replaced, integers or a token policy in a preallocated cache, or integers under a policy
            that drops tokens one by one as others come.
    """
    given = load_mask(mask) if isinstance(mask, str | Path) else mask
    if not isinstance(given, KVMask | CachePlan):
        raise InputError(f"a cache is made of a mask's folder, a KVMask or a CachePlan, not of {type(given).__name__}")
    require_attention_interface(model)
    if isinstance(given, KVMask):
        given.check_model(model.config, str(model.config.name_or_path))
        if given.prefill != "full":
            raise InputError(f"this mask asks for {given.prefill} prefill, and the runtime can only run full prefill")
        given = given.plan
    bits = {kind: each for kind, each in zip(KINDS, (key_bits, value_bits), strict=True) if each is not None}
    return _assembled(model, given.changed(generated=generated, bits=bits), max_length, offload, kernel)


def online_cache(
    model: PreTrainedModel,
    method: Method | str = "grace-opt",
    *,
    ratio: float,
    value_ratio: float = 0.0,
    max_length: int | None = None,
    key_bits: int | None = None,
    value_bits: int | None = None,
    generated: Literal["keep", "prune"] | None = None,
    offload: bool = False,
    kernel: str | None = None,
) -> PrunedCache:
    """As `cache`, but each prompt chooses what is kept of it, layer by layer, right after its attention was computed.

    The method's parts are applied on the model's device, to each row of the batch; every head prunes the same number of
    channels, as a layer cannot wait for those behind it. The solver is greedy, or independent (ThinK).

    Raises:
        InputError: as `cache`; for a method that selects by another solver, or an unknown one; for ratios outside
            [0, 1).
    """
    policy = named(method) if isinstance(method, str) else method
    require_attention_interface(model)
    layers = DynamicCache(config=text_config(model.config)).layers
    plan = online(
        policy, [i for i, each in enumerate(layers) if type(each) is DynamicLayer], Budget(ratio, value_ratio)
    )
    bits = {kind: each for kind, each in zip(KINDS, (key_bits, value_bits), strict=True) if each is not None}
    return _assembled(model, plan.changed(generated=generated, bits=bits), max_length, offload, kernel)


def _assembled(
    model: PreTrainedModel, plan: CachePlan, max_length: int | None, offload: bool, kernel: str | None
) -> PrunedCache:
    check_name(kernel)
    config = text_config(model.config)
    if max_length is not None:
        _check_preallocated(plan, max_length)
    layers: list[Any] = DynamicCache(config=config).layers
    kinds = [type(layer) for layer in layers]
    if max_length is not None:
        layers = StaticCache(config=config, max_cache_len=max_length).layers
    for layer_plan in plan:
        index = layer_plan.index
        if index >= len(layers):
            raise InputError(f"the plan has a layer {index}, and this model has {len(layers)}; use one made for it")
        if kinds[index] is not DynamicLayer:
            raise InputError(
                f"layer {index} of this model needs a {kinds[index].__name__}, whose channels cannot be pruned yet; "
                "leave the layer out of the mask"
            )
        _check_sliding(layer_plan)
        layers[index] = _layer(layer_plan, max_length, kernel)
        layers[index].offloading = offload
    rotary = rotary_of(model)
    if any(_before_rope(layer_plan) for layer_plan in plan):
        rotary.layers()  # before the model runs, as it runs the model
    looked_at = [layer_plan.index for layer_plan in plan if _looks_at_inputs(layer_plan)]
    given = Given(model, looked_at) if looked_at else None
    for layer_plan in plan:
        layers[layer_plan.index].turn = Turn(rotary, layer_plan.index)
        if given is not None:
            layers[layer_plan.index].given = given
    past = PrunedCache(layers=layers)
    past._use(plan, model)
    if given is not None:
        past._look = weakref.finalize(past, given.end)
    return past


def _before_rope(plan: LayerPlan) -> bool:
    """Whether keys are stored before RoPE."""
    if plan.choice is not None:
        return CODECS[plan.choice.method.codec].before_rope
    return any(without_integers(codec).before_rope for codec in plan.codecs.get("key", ()))


def _looks_at_inputs(plan: LayerPlan) -> bool:
    """Whether what is fitted to a prompt asks what the projections were given."""
    if plan.choice is None:
        return False
    method = plan.choice.method
    return CODECS[method.codec].looks_at_inputs(**method.codec_options)


def _check_preallocated(plan: CachePlan, max_length: int) -> None:
    if max_length < 1:
        raise InputError(f"max_length must be at least 1, got {max_length}")
    for layer in plan:
        if layer.tokens is not None:
            raise InputError("a token policy needs a cache that grows; leave out max_length")


def _check_sliding(plan: LayerPlan) -> None:
    rule = plan.tokens
    if rule is not None and rule.policy.slides and plan.windows.generated == "prune" and _packs(plan):
        raise InputError(
            f"the token policy {rule.policy.name!r} drops tokens one by one as others come, and integers are held in "
            "blocks; keep generated tokens (generated: keep), or hold rows as they are (bits: 0)"
        )


def _packs(plan: LayerPlan) -> bool:
    """Whether tokens are held in blocks."""
    chosen = plan.choice.method if plan.choice is not None else None
    packed = any(codec.block for codecs in plan.codecs.values() for codec in codecs)
    return packed or bool(chosen and (chosen.key_bits or chosen.value_bits))


def _layer(plan: LayerPlan, max_length: int | None, kernel: str | None) -> PrunedLayer | RaggedLayer:
    def made(part: LayerPlan) -> PrunedLayer:
        layer = PrunedLayer(part) if max_length is None else StaticPrunedLayer(part, max_length)
        layer.kernel = kernel
        return layer

    if plan.tokens is not None and plan.tokens.policy.per_head:
        return RaggedLayer(plan, [[]], [made(plan)])
    groups: dict[Any, list[int]] = {}
    for head in range(max(map(len, plan.codecs.values()), default=0)):
        of_head = (each[head if len(each) > 1 else 0].signature() for each in plan.codecs.values())
        groups.setdefault(tuple(of_head), []).append(head)
    if len(groups) < 2:
        return made(plan)
    if plan.joint:
        raise InputError(
            f"layer {plan.index} has rows of all KV heads beside heads of different widths; give the others one width"
        )
    heads = sorted(groups.values(), key=lambda each: ([codecs[each[0]].width for codecs in plan.codecs.values()], each))
    return RaggedLayer(plan, heads, [made(plan.part(each)) for each in heads])


def cache_nbytes(past: Cache) -> int:
    """Bytes of every tensor that a transformers cache holds, each storage counted once and whole."""
    storages: dict[int, int] = {}
    for layer in past.layers:
        held = layer.tensors() if isinstance(layer, PrunedLayer | RaggedLayer) else vars(layer).values()
        for tensor in held:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def full_cache_nbytes(past: Cache) -> int:
    """Bytes that the same tokens would take if nothing were compressed."""
    total = cache_nbytes(past)
    for layer in past.layers:
        if isinstance(layer, PrunedLayer | RaggedLayer):
            total += layer.full_nbytes() - cache_nbytes(Cache(layers=[layer]))
    return total
