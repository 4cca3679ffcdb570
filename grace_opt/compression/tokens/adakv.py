"""AdaKV: the heads of a layer share its tokens' budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grace_opt.compression.plugins import POLICIES
from grace_opt.compression.tokens.scores import Scored, highest
from grace_opt.errors import InputError
from grace_opt.graphs.observed import Observed


@dataclass(frozen=True)
class AdaKV(Scored):
    """The highest scores of all heads of a layer together, and of each head at least some (arXiv 2407.11550, alg. 1).

    Feng et al.: where scores are attention, this keeps the most mass of it for the budget (theorem 3.2). ``scorer``
    names a policy with scores in each head; ``floor`` of the mean head's budget is sure for every head. The total is
    exact; the published code's rounding lets it drift, by up to half a token a head.
    """

    scorer: str = "snapkv"
    floor: float = 0.2

    name: ClassVar[str] = "adakv"

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise InputError(f"the floor of adakv must be from 0 to 1, got {self.floor}")
        of = POLICIES[self.scorer]
        if of is AdaKV or not (issubclass(of, Scored) and of.per_head):
            raise InputError(f"adakv cannot share by {self.scorer!r}, which has no scores in each head; use snapkv")

    def scores(self, seen: Observed) -> Tensor:
        scorer = POLICIES[self.scorer]()
        assert isinstance(scorer, Scored)
        return scorer.scores(seen)

    def staying(self, scores: Tensor, count: int) -> Tensor:
        sure = highest(scores, int(self.floor * count))
        free = scores.masked_fill(sure, torch.inf).flatten()
        return highest(free, len(scores) * count).view_as(scores)
