"""StreamingLLM: sinks and the last tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from grace_opt.compression.tokens.base import Tier, TokenPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from grace_opt.graphs.observed import Observed


@dataclass(frozen=True)
class Streaming(TokenPolicy):
    """The sinks, and as many of the last tokens, whole, as the share allows (Xiao et al., arXiv 2309.17453).

    Tokens keep their own positions. O(T).
    """

    name: ClassVar[str] = "streaming"
    slides: ClassVar[bool] = True
    whole: ClassVar[bool] = True

    def tiers(self, seen: Observed, share: float) -> Tensor:
        import torch

        old = seen.prunable
        stay = round(share * (old.stop - old.start))
        tiers = torch.full((seen.keys.shape[1],), int(Tier.WHOLE), dtype=torch.int8, device=seen.keys.device)
        tiers[old.start : old.stop - stay] = Tier.DROPPED
        return tiers
