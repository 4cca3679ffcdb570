"""Expected attention: the tokens that queries of the observed distribution would attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from grace_opt.compression.tokens.scores import Scored, of_kv_heads
from grace_opt.errors import InputError
from grace_opt.graphs.observed import Observed


@dataclass(frozen=True)
class ExpectedAttention(Scored):
    """Attention expected of Gaussian queries, times the value's norm (Devoto et al., arXiv 2510.00636, section 3).

    With q ~ N(mu, S) and the softmax scale s, E exp(s q.k) = exp(s mu.k + s^2 k'Sk / 2); a token's score is its share
    of that, the mean over the query heads, plus ``epsilon``, times the norm of its value. mu and S are those of the
    observed queries after RoPE, so future queries are taken to be like the last ones; the published code takes them
    before RoPE, over the whole prompt, and turns them by the mean rotation of the next 512 positions.
    O(Hq (w n^2 + T n^2)).
    """

    epsilon: float = 0.0

    name: ClassVar[str] = "expected-attention"

    def __post_init__(self) -> None:
        if not self.epsilon >= 0:
            raise InputError(f"epsilon of expected-attention must not be negative, got {self.epsilon}")

    def scores(self, seen: Observed) -> Tensor:
        heads, old = len(seen.keys), seen.prunable
        queries = seen.queries.float() * seen.scaling
        mean = queries.mean(1, keepdim=True)
        apart = queries - mean
        covariance = (apart.mT @ apart / queries.shape[1]).view(heads, -1, *2 * queries.shape[-1:])
        keys = seen.keys[:, old].float()[:, None]
        logits = (mean.view(heads, -1, 1, keys.shape[-1]) * keys).sum(-1) + (keys @ covariance * keys).sum(-1) / 2
        expected = of_kv_heads(logits.softmax(-1).flatten(0, 1), heads)
        norms: Tensor = seen.values[:, old].float().norm(dim=-1)
        return (expected + self.epsilon) * norms
