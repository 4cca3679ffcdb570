"""TOVA: the tokens that the last query attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from grace_opt.compression.tokens.scores import Scored, received
from grace_opt.graphs.observed import Observed


@dataclass(frozen=True)
class Tova(Scored):
    """Attention of the last query, the mean over all heads of a layer (Oren et al., arXiv 2401.06104, section 3.2).

    All heads hold the same tokens. Chosen once, after the prompt; the published one evicts a token at every step.
    O(Hq T n).
    """

    name: ClassVar[str] = "tova"
    per_head: ClassVar[bool] = False

    def scores(self, seen: Observed) -> Tensor:
        return received(seen, 1)[:, seen.prunable].mean(0, keepdim=True)
