"""SnapKV: the tokens that the prompt's last queries attend to, with their neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from grace_opt.compression.tokens.scores import Scored, of_kv_heads, received
from grace_opt.errors import InputError
from grace_opt.graphs.observed import Observed


@dataclass(frozen=True)
class SnapKV(Scored):
    """Attention of the observed queries, pooled over neighbours (Li et al., arXiv 2404.14469, section 4.2).

    ``kernel`` tokens are pooled, an odd number, by their ``max`` or ``mean``, in each query head; a KV head's score is
    the mean over its query heads, so that it holds each token once. The published code chooses for each query head, and
    its pool reaches into the sinks, which are not ranked here. O(Hq w T n).
    """

    kernel: int = 7
    pooling: Literal["max", "mean"] = "max"

    name: ClassVar[str] = "snapkv"

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise InputError(f"the kernel of {self.name} must be odd and at least 1, got {self.kernel}")
        if self.pooling not in ("max", "mean"):
            raise InputError(f"the pooling of {self.name} must be max or mean, got {self.pooling!r}")

    def scores(self, seen: Observed) -> Tensor:
        attended, around = received(seen)[:, seen.prunable], self.kernel // 2
        if self.pooling == "max":
            pooled = max_pool1d(attended, self.kernel, 1, around)
        else:
            pooled = avg_pool1d(attended, self.kernel, 1, around, count_include_pad=False)
        return of_kv_heads(pooled, len(seen.keys))
