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

    ``prompt``: the whole keys and values [B, H, T, D] if the cache was empty before. If it was not, ``pending``: those
    of the new tokens as they came, None once they are stored. Room for them was made. A kernel may store them as it
    attends; who needs them stored asks for ``spans`` or ``residuals``. ``new``: how many tokens came with this update.
    ``values``: whole values, as they were given to the model.
    """

    def __init__(
        self, layer: PrunedLayer, new: int, prompt: tuple[Tensor, Tensor] | None, states: Sequence[Tensor] = ()
    ) -> None:
        self.layer, self.new, self.prompt = layer, new, prompt
        self.pending: list[Tensor | None] = list(states)
        self.values: Tensor | None = None
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}  # side -> span and residuals, but of what a kernel stored

    def store(self, *sides: int) -> None:
        """Store the new tokens, of keys (0) or values (1) alone where ``sides`` says so."""
        for i in sides or range(len(self.pending)):
            states, side = self.pending[i], self.layer.sides[i]
            if states is not None:
                residuals = side.put(states, self.layer.length - self.new, self.layer.positions)
                self._stored[i] = side.window.push(residuals, self.layer.length), residuals
                self.pending[i] = None

    @property
    def spans(self) -> list[Tensor]:
        """Of keys and values: the residuals [B, H, _, e] that the new queries may see whole, in order of slots."""
        self.store()
        return [self._stored[i][0] for i in range(len(self.pending))]

    @property
    def residuals(self) -> list[Tensor]:
        """Of keys and values: those of the new tokens."""
        self.store()
        return [self._stored[i][1] for i in range(len(self.pending))]


class RaggedHandle(_Unreadable):
    """Of a `RaggedLayer`: the handles of its parts."""

    def __init__(self, layer: RaggedLayer, parts: list[Handle]) -> None:
        self.layer, self.parts = layer, parts
        self.new = parts[0].new
        self.prompt: tuple[Tensor, Tensor] | None = None
        self.values: Tensor | None = None


class TogetherHandle(_Unreadable):
    """Of several caches that decode together: of each row, the keys and values, or the handles, of its own cache."""

    def __init__(self, rows: list[tuple[Any, Any]]) -> None:
        self.rows = rows
