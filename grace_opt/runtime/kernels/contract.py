"""What a kernel gets, and what it must answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from grace_opt.runtime.handle import Handle
    from grace_opt.runtime.layer import PrunedLayer


@dataclass(frozen=True, eq=False)
class Request:
    """Attention of the tokens that just came over a filled layer, in slots.

    Attributes:
        query: [B, Hq, n, D], of all tokens of the update, or some in a row.
        handle: of the update; ``handle.layer`` has the two sides, ``handle.spans`` the window's residuals.
        mask: bool or additive [B or 1, 1, n, slots], or None: each query sees all tokens up to its own.
        scaling: of the products.
        dropout: of the weights.
        changed: [B, Hkv, T, Dv], whole values that the model has made of the cache's, in place of them.
        low: number of the first query in the update.
    """

    query: Tensor
    handle: Handle
    mask: Tensor | None
    scaling: float
    dropout: float = 0.0
    changed: Tensor | None = None
    low: int = 0

    @property
    def new(self) -> int:
        """How many queries there are."""
        return self.query.shape[2]

    def part(self, low: int, count: int) -> Request:
        """Some queries in a row."""
        some = slice(low, low + count)
        mask = None if self.mask is None else self.mask[:, :, some]
        return replace(self, query=self.query[:, :, some], mask=mask, low=self.low + low)


class Kernel(Protocol):
    """A way to compute attention over a compressed layer. All give the same numbers, up to rounding."""

    name: str

    def reads(self, layer: PrunedLayer) -> bool | str:
        """Whether it reads what the layer holds: True, or the reason why not. Asked once, when the prompt is stored."""

    def takes(self, request: Request) -> bool | str:
        """Whether it takes this request: True, or the reason why not."""

    def attend(self, request: Request) -> Tensor:
        """Outputs [B, Hq, n, Dv]."""


def by_head(layer: PrunedLayer) -> bool | str:
    """Whether each KV head has rows of its own, which meet its queries as they lie: True, or the reason why not."""
    if any(side.turn is not None or side.codec.heads > 1 for side in layer.sides):
        return "it reads rows of one KV head, of keys after RoPE"
    return True


def one_token(request: Request) -> bool | str:
    """Whether it is what a decoding kernel takes: True, or the reason why not."""
    if request.new > 1 or request.dropout or request.changed is not None:
        return "it decodes one token of each row, without dropout, from the cache's own values"
    return True
