"""What token policies rank tokens by: the attention that the last queries of a prompt give to all of its tokens."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grace_opt.compression.tokens.base import Tier, TokenPolicy, TokenRule
from grace_opt.graphs.observed import Observed

_ELEMENTS = 1 << 24  # of the scores that are held at a time: 64 MB


def received(seen: Observed, queries: int | None = None) -> Tensor:
    """float32[Hq, T]: the attention that each token receives from the last ``queries`` (None: all that were observed).

    Column sums of the causal softmax over all tokens, so each query head's sum is the number of queries. Blocks of
    queries are computed at a time; O(Hq w T n) time, O(Hq T) memory beside a block. Made once for a prompt.
    """
    width = seen.queries.shape[1]
    last = width if queries is None else min(queries, width)
    return seen.once(("received", last), lambda: _received(seen, last))


def _received(seen: Observed, last: int) -> Tensor:
    heads, tokens, n = seen.keys.shape
    asked = seen.queries[:, -last:].float().view(heads, -1, last, n) * seen.scaling
    columns = torch.arange(tokens, device=seen.keys.device)
    keys = seen.keys.float().mT[:, None]
    total = torch.zeros(heads, asked.shape[1], tokens, device=seen.keys.device)
    rows = max(1, _ELEMENTS // (len(seen.queries) * tokens))
    for low in range(0, last, rows):
        at = torch.arange(low, min(low + rows, last), device=columns.device) + tokens - last
        scores = (asked[:, :, low : low + rows] @ keys).masked_fill_(columns > at[:, None], -torch.inf)
        total += scores.softmax(-1).sum(2)
    return total.flatten(0, 1)


def of_kv_heads(scores: Tensor, heads: int) -> Tensor:
    """The mean over each KV head's query heads: [Hq, T] -> [heads, T]."""
    return scores.view(heads, -1, scores.shape[-1]).mean(1)


def mass_lost(rule: TokenRule, seen: Observed) -> Tensor:
    """float32[Hq]: the attention on the old tokens that a policy drops, the mean over the observed queries."""
    old = seen.prunable
    dropped = rule.policy.tiers(seen, rule.share)[..., old] == Tier.DROPPED
    by_query = dropped.expand(len(seen.keys), -1).repeat_interleave(len(seen.queries) // len(seen.keys), 0)
    return (received(seen)[:, old] * by_query).sum(1) / seen.queries.shape[1]


@dataclass(frozen=True)
class Scored(TokenPolicy):
    """Keeps the old tokens that score highest in each KV head, as the codecs store them; of equals, the first."""

    per_head: ClassVar[bool] = True

    @abstractmethod
    def scores(self, seen: Observed) -> Tensor:
        """float32[H, old] of the old tokens, higher to stay; [1, old] of a policy that is not ``per_head``."""

    def staying(self, scores: Tensor, count: int) -> Tensor:
        """bool of the scores' shape: the tokens that stay, ``count`` in the average head."""
        return highest(scores, count)

    def tiers(self, seen: Observed, share: float) -> Tensor:
        old = seen.prunable
        scores = seen.once(("scores", self), lambda: self.scores(seen))
        tiers = torch.full(
            (len(scores), seen.keys.shape[1]), int(Tier.COMPRESSED), dtype=torch.int8, device=scores.device
        )
        tiers[:, old] = self.staying(scores, round(share * (old.stop - old.start))).to(tiers)
        return tiers if self.per_head else tiers[0]


def highest(scores: Tensor, count: int) -> Tensor:
    """bool: the ``count`` highest of each row of scores [.., n]; of equals, the first. O(n log n)."""
    first = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, first, True)
