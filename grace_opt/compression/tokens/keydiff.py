"""KeyDiff: the tokens whose keys are unlike the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from grace_opt.compression.tokens.scores import Scored
from grace_opt.graphs.observed import Observed


@dataclass(frozen=True)
class KeyDiff(Scored):
    """Keys least alike, by cosine, the mean of all unit keys (Park et al., arXiv 2504.15364, algorithm 1).

    Of keys after RoPE, in each head, once over the whole prompt; the paper goes through it in blocks, so that no more
    than the budget is ever held. No query is read. O(H T n).
    """

    name: ClassVar[str] = "keydiff"

    def scores(self, seen: Observed) -> Tensor:
        keys = seen.keys.float()
        anchor = normalize(keys, dim=-1).mean(1, keepdim=True)
        return -cosine_similarity(keys[:, seen.prunable], anchor, dim=-1)
