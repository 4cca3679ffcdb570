"""H2O: heavy hitters and the last tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grace_opt.compression.tokens.scores import Scored, highest, of_kv_heads, received
from grace_opt.errors import InputError
from grace_opt.graphs.observed import Observed


@dataclass(frozen=True)
class H2O(Scored):
    """The last tokens, and of the others those with most attention so far (Zhang et al., arXiv 2306.14048, alg. 1).

    ``recent`` of the old tokens that stay are the last ones. Attention is summed over the queries that are observed;
    as published, those are all of the prompt's: set the observation window to its length (O(Hq T^2 n), in blocks). It
    is causal for each query. Chosen once, after the prompt; the published one goes on evicting as tokens come.
    """

    recent: float = 0.5

    name: ClassVar[str] = "h2o"

    def __post_init__(self) -> None:
        if not 0 <= self.recent <= 1:
            raise InputError(f"the recent share of h2o must be from 0 to 1, got {self.recent}")

    def scores(self, seen: Observed) -> Tensor:
        return of_kv_heads(received(seen)[:, seen.prunable], len(seen.keys))

    def staying(self, scores: Tensor, count: int) -> Tensor:
        last = torch.arange(scores.shape[1], device=scores.device) >= scores.shape[1] - int(self.recent * count)
        return highest(scores.masked_fill(last, torch.inf), count)
