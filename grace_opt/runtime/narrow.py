"""Prompts computed on what a compressed cache stores, as runtimes do that attend to nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grace_opt.runtime.layer import PrunedLayer
from grace_opt.runtime.ragged import RaggedLayer

if TYPE_CHECKING:
    from torch import Tensor

    from grace_opt.runtime.cache import PrunedCache


def prefill_narrow(model: Any, past: PrunedCache, prompt: Tensor, chunk: int) -> Any:
    """Run ``prompt`` int64[1, T] on an empty compressed cache, each token seeing the others as if they came one by one.

    That is how a runtime computes prompts that attends to nothing but what it stores. ``chunk``: tokens of one pass, at
    most. Returns the output of the last pass.
    """
    low = min(
        [prompt.shape[1], *(max(1, layer.windows.recent_window) for layer in past.plan)]
    )  # all of them are recent
    last = model(input_ids=prompt[:, :low], past_key_values=past, use_cache=True)
    for layer in past.layers:
        if isinstance(layer, PrunedLayer | RaggedLayer):
            layer.stepwise = True
    while low < prompt.shape[1]:
        high = low + min([chunk, *unbroken(past)])
        last = model(input_ids=prompt[:, low:high], past_key_values=past, use_cache=True)
        low = high
    return last


def unbroken(past: Any) -> list[int]:
    """How many tokens each layer takes at once as if they came one by one, where that is limited."""
    steps = [layer.unbroken() for layer in past.layers if isinstance(layer, PrunedLayer | RaggedLayer)]
    return [each for each in steps if each is not None]
