"""A prompt, run once: its cache, and what the attention of its last queries saw."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grace_opt.compression.method import Windows
from grace_opt.errors import InputError
from grace_opt.graphs.observed import InputProjections, Observed, OutputProjection
from grace_opt.models.attention import attending_with, observing, require_attention_interface
from grace_opt.models.given import Given
from grace_opt.models.inputs import input_device, require_rows
from grace_opt.models.rotary import Turn, rotary_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Captured:
    """The uncompressed cache of a prompt, and what each full-attention layer saw of its last queries."""

    model: PreTrainedModel
    ids: Tensor  #: int64[1, prefix + scored]
    prefix: int
    past: Any  #: transformers' DynamicCache of the prefix
    queries: dict[int, Tensor]  #: layer -> [Hq, w, n], the last queries of the prefix
    scaling: dict[int, float]
    outputs: dict[int, OutputProjection]  #: layer -> the projection after its attention
    inputs: dict[int, InputProjections]  #: layer -> the projections before it, where it has any
    seconds: float
    _observed: dict[tuple[int, int, int, int | None], dict[int, Observed]] = field(default_factory=dict)

    def observed(self, queries: int, windows: Windows, spans: int | None) -> dict[int, Observed]:
        """For `grace_opt.compression.apply.apply`. Raises InputError if the prefix is shorter than its windows."""
        seen = self._observed.setdefault((queries, windows.recent_window, windows.sinks, spans), {})
        for layer, asked in () if seen else self.queries.items():
            seen[layer] = Observed(
                asked[:, -queries:],
                self.past.layers[layer].keys[0],
                self.past.layers[layer].values[0],
                self.scaling[layer],
                windows.sinks,
                windows.recent_window,
                self.outputs[layer],
                spans,
                Turn(rotary_of(self.model), layer),
                self.inputs.get(layer),
            )
        return seen


def capture(model: PreTrainedModel, ids: Sequence[int], prefix: int, queries: int) -> Captured:
    """Run the first ``prefix`` of ``ids`` through the model's body, and keep its last ``queries`` queries.

    Raises InputError for a model whose attention cannot be observed, or all of whose layers have sliding windows.
    """
    from transformers.cache_utils import DynamicCache

    require_attention_interface(model)
    require_rows(model, ids)
    row = torch.tensor([list(ids)], device=input_device(model))
    past = DynamicCache(config=model.config.get_text_config(decoder=True))
    return _captured(model, row, prefix, past, queries, {}, {})


def extended(captured: Captured, ids: Sequence[int]) -> Captured:
    """The capture of the prefix and these further tokens, which alone are run: the prefix is in its cache.

    It looks at as many of the last queries as ``captured`` did, which stays as it is.
    """
    row = torch.cat([captured.ids[:, : captured.prefix], captured.ids.new_tensor([list(ids)])], 1)
    queries = next(iter(captured.queries.values())).shape[1]
    return _captured(captured.model, row, row.shape[1], dense(captured), queries, captured.queries, captured.inputs)


def dense(captured: Captured) -> Any:
    """The uncompressed cache after the prompt; the captured one stays as it is."""
    from transformers.cache_utils import DynamicCache

    past = DynamicCache(config=captured.model.config.get_text_config(decoder=True))
    past.layers = [copy.copy(layer) for layer in captured.past.layers]  # updates replace tensors, and write into none
    return past


def _captured(
    model: PreTrainedModel,
    row: Tensor,
    prefix: int,
    past: Any,
    queries: int,
    before: Mapping[int, Tensor],
    inputs_before: Mapping[int, InputProjections],
) -> Captured:
    """Run what ``past`` does not hold of the prefix; ``before``: the last queries and the inputs of what it does."""
    from transformers.cache_utils import DynamicLayer

    asked: dict[int, Tensor] = {}
    scaling: dict[int, float] = {}
    outputs: dict[int, OutputProjection] = {}
    inputs: dict[int, InputProjections] = {}
    held = int(past.get_seq_length())

    def keep(module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, arguments: dict[str, Any]) -> None:
        if arguments.get("sliding_window") is not None:
            return
        layer = module.layer_idx
        last = torch.cat([before[layer], query[0]], 1) if layer in before else query[0]
        asked[layer] = last[:, -queries:].clone()
        scaling[layer] = scale
        outputs[layer] = OutputProjection(module, query.shape[1], value)
        if (hidden := given.take(layer)) is not None:
            mean = hidden[0].float().abs().mean(0)
            if held:
                mean = (held * inputs_before[layer].magnitudes + (prefix - held) * mean) / prefix
            inputs[layer] = InputProjections(module, mean)

    began = time.perf_counter()
    with torch.inference_mode(), attending_with(model, observing(keep)), Given(model) as given:
        model.base_model(input_ids=row[:, held:prefix], past_key_values=past, use_cache=True)
    seconds = time.perf_counter() - began
    for layer in [layer for layer in asked if type(past.layers[layer]) is not DynamicLayer]:
        del asked[layer]  # a sliding or chunked window: its cache is short already, and stays as it is
    if not asked:
        raise InputError(
            f"{type(model).__name__} has no layer that attends to all tokens; the caches of its sliding windows are "
            "short already, and compressing them is not supported"
        )
    return Captured(model, row, prefix, past, asked, scaling, outputs, inputs, seconds)
