"""What a model's attention layers are given, for methods that look at the input of projections (ASVD)."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Given:
    """Until `end`: the hidden states [B, T, D] that each attention layer was given last, of those layers or all."""

    def __init__(self, model: PreTrainedModel, layers: Collection[int] | None = None) -> None:
        self._held: dict[int, Tensor] = {}
        self._handles = [
            module.register_forward_pre_hook(self._see, with_kwargs=True)
            for module in model.base_model.modules()
            if hasattr(module, "k_proj") and hasattr(module, "layer_idx")
            if layers is None or module.layer_idx in layers
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def __deepcopy__(self, memo: object) -> Given:
        return self

    def _see(self, module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = named["hidden_states"] if "hidden_states" in named else arguments[0] if arguments else None
        if isinstance(hidden, Tensor):
            self._held[module.layer_idx] = hidden.detach()

    def take(self, layer: int) -> Tensor | None:
        """What a layer was given, held no longer; None if it has no projections of its own."""
        return self._held.pop(layer, None)

    def end(self) -> None:
        """Look no longer."""
        self._held.clear()
        for handle in self._handles:
            handle.remove()
