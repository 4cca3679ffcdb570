"""What a compressed layer gives the model in place of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from grace_opt.errors import InputError
from grace_opt.models.attention import NAME

if TYPE_CHECKING:
    from grace_opt.runtime.layer import PrunedLayer
    from grace_opt.runtime.ragged import RaggedLayer


class _Unreadable:
    def __getattr__(self, name: str) -> Any:
        # Reached by a stock attention function, or by model code that looks into the keys itself.
        raise InputError(
            f"these keys are channel-pruned and only the {NAME!r} attention function can read them: call "
            f"model.set_attn_implementation({NAME!r}) again if it was switched; if it was not, this model "
            "handles its cached keys itself and is not supported"
        )


class Handle(_Unreadable):
    """Of a `PrunedLayer`; only `attention` can read it.

    ``prompt``: the whole keys and values [B, H, T, D] if the cache was empty before. If it was not: ``spans``, the
    residuals of keys and values [B, H, _, e] that the new queries may see whole, and ``residuals``, the new ones.
    ``new``: how many tokens came with this update. ``values``: whole values, as they were given to the model.
    """

    def __init__(
        self,
        layer: PrunedLayer,
        new: int,
        prompt: tuple[Tensor, Tensor] | None,
        spans: Sequence[Tensor] = (),
        residuals: Sequence[Tensor] = (),
    ) -> None:
        self.layer, self.new, self.prompt, self.spans, self.residuals = layer, new, prompt, spans, residuals
        self.values: Tensor | None = None


class RaggedHandle(_Unreadable):
    """Of a `RaggedLayer`: ``heads`` int64[h], the KV heads of each part, and the parts' handles."""

    def __init__(self, layer: RaggedLayer, heads: list[Tensor], parts: list[Handle]) -> None:
        self.layer, self.heads, self.parts = layer, heads, parts
        self.new = parts[0].new
        self.prompt: tuple[Tensor, Tensor] | None = None
        self.values: Tensor | None = None
