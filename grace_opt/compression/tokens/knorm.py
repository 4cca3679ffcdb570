"""Knorm: the tokens with small keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from grace_opt.compression.tokens.scores import Scored
from grace_opt.graphs.observed import Observed


@dataclass(frozen=True)
class Knorm(Scored):
    """The keys of least norm, in each head (Devoto et al., arXiv 2406.11430, section 4). No query is read. O(H T n)."""

    name: ClassVar[str] = "knorm"

    def scores(self, seen: Observed) -> Tensor:
        norms: Tensor = seen.keys[:, seen.prunable].float().norm(dim=-1)
        return -norms
