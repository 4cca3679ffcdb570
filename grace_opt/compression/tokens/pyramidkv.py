"""PyramidKV: SnapKV with more tokens in the first layers than in the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from grace_opt.compression.tokens.snapkv import SnapKV
from grace_opt.errors import InputError


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV whose shares fall linearly over the layers (Cai et al., arXiv 2406.02069, section 4.2).

    The last layer gets 1 / ``beta`` of the mean share b, the first 2 b less that, so that the mean is b; where that is
    more than all tokens the first has them all, and the last what is left. The published code rounds each step to
    whole tokens, which holds up to a token a layer more.
    """

    beta: float = 20.0

    name: ClassVar[str] = "pyramidkv"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 1:
            raise InputError(f"beta of {self.name} must be at least 1, got {self.beta}")

    def layer_shares(self, share: float, layers: int) -> list[float]:
        if layers < 2:
            return [share] * layers
        most = min(1.0, 2 * share - share / self.beta)
        least = 2 * share - most
        return [min(1.0, most - (most - least) * i / (layers - 1)) for i in range(layers)]
