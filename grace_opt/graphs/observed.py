"""What one layer's attention saw in one window of text: the raw material of graphs and read-outs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from grace_opt.errors import InputError
from grace_opt.problem import FloatArray


@dataclass(frozen=True, eq=False)
class Observed:
    """The last queries and all keys and values of one row, post-RoPE, and which tokens a mask would prune.

    queries [Hq, w, n] are those of the last w tokens; keys [H, T, n]; values [H, T, nv]; H divides Hq, and query head g
    belongs to KV head g // (Hq / H). ``output`` [hidden, Hq nv] is the weight of the output projection. The first
    ``sinks`` tokens are whole for every query, and the others while they are fewer than ``recent_window`` tokens back.
    ``spans``: how many spans the queries are cut into by the `attention` objective; None: a query is a span.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    sinks: int
    recent_window: int
    output: Tensor | None = None
    spans: int | None = None
    graphs: dict[str, FloatArray] = field(default_factory=dict)  #: those that were made of it, by objective

    def __post_init__(self) -> None:
        if self.queries.shape[0] % self.keys.shape[0] or self.queries.shape[-1] != self.keys.shape[-1]:
            raise InputError(
                f"queries of shape {tuple(self.queries.shape)} cannot attend to keys of shape "
                f"{tuple(self.keys.shape)}; only multi-head, grouped-query and multi-query attention are supported"
            )
        if self.keys.shape[1] <= self.sinks + self.recent_window:
            raise InputError(
                f"{self.keys.shape[1]} tokens have no prunable key between {self.sinks} sinks and a recent window of "
                f"{self.recent_window}; give more tokens or make those shorter"
            )

    @property
    def prunable(self) -> slice:
        """The tokens of which the cache keeps some channels only, once the window has been read."""
        return slice(self.sinks, self.keys.shape[1] - self.recent_window)

    @cached_property
    def all_tokens(self) -> Observed:
        """The same, as if no token stayed whole."""
        return replace(self, sinks=0, recent_window=0, graphs={})

    @cached_property
    def grouped(self) -> Tensor:
        """The queries by KV head, [H, G w, n]."""
        return self.queries.reshape(self.keys.shape[0], -1, self.keys.shape[-1])

    @cached_property
    def attention(self) -> Tensor:
        """Softmax weights [H, G w, prunable] of the pairs that meet pruned: 0 where the token is whole for the query.

        Float32. They are those of the whole attention: the rows sum to less than 1, by what whole tokens receive.
        """
        tokens, width = self.keys.shape[1], self.queries.shape[1]
        scores = torch.matmul(self.grouped.float() * self.scaling, self.keys.float().mT)
        at = torch.arange(tokens - width, tokens, device=scores.device).repeat(scores.shape[1] // width)
        age = at[:, None] - torch.arange(tokens, device=scores.device)
        weights = scores.masked_fill_(age < 0, -torch.inf).softmax(-1)
        return weights.mul_(age >= self.recent_window)[..., self.prunable]

    @cached_property
    def token_weights(self) -> Tensor:
        """Attention that each prunable token receives, [H, prunable], summing to 1; equal where none receives any."""
        received = self.attention.sum(1)
        total = received.sum(-1, keepdim=True)
        return torch.where(total > 0, received / total, torch.full_like(received, 1 / received.shape[-1]))


def double(tensor: Tensor) -> Tensor:
    """In float64, on its own device where that has float64."""
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


def output_projection(attention: Any, heads: int) -> Tensor | None:
    """The weight [hidden, heads * nv] of the projection after an attention module; None if it has no known name."""
    for name in ("o_proj", "out_proj", "dense", "wo"):
        weight = getattr(getattr(attention, name, None), "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[1] % heads == 0:
            return weight.detach()
    return None
