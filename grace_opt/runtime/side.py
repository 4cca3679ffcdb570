"""The keys or the values of one cache layer: kept channels of all tokens, dropped ones of the whole tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grace_opt.runtime.buffers import Store


class Channels:
    """Keys or values of B rows and H KV heads that keep the same number of their n channels.

    A whole token holds a *row* beside its kept channels x_A: its dropped channels x_P, less what they are read as from
    x_A, x_P - B x_A - constant (without a read-out: x_P). So one formula serves all tokens: a key's score is
    (q_A + B'q_P)'k_A, plus q_P'row for whole tokens, short of q_P'constant, which is the same for all tokens of a query
    and cancels in the softmax. An output is o_A in the kept channels, and B o_A + constant + sum p row in the others.

    Args:
        order: int64[1 or B, H, n], each head's kept channels, then the others; None if all are kept.
        width: how many are kept, d.
    """

    store: Store
    window: Tensor  #: [B, H, _, n - d], the rows of the last tokens
    sinks: Tensor  #: [B, H, sinks, n - d], zeros for those that have not come yet

    def __init__(self, order: Tensor | None, width: int) -> None:
        self.order, self.width = order, width
        self.per_prompt = False  #: whether the order was chosen from the prompts held here
        self.matrix: Tensor | None = None  #: B, [B, H, n - d, d]
        self.constant: Tensor | None = None  #: [B, H, 1, n - d]

    def split(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H, m, n] -> each head's kept channels [.., d] and its dropped ones [.., n - d]."""
        if self.order is None:
            return states, states[..., :0]
        states = states.gather(-1, self.order[:, :, None].expand(*states.shape[:3], -1))
        return states[..., : self.width], states[..., self.width :]

    def merge(self, kept: Tensor, dropped: Tensor) -> Tensor:
        """The inverse of `split`."""
        if self.order is None:
            return kept
        states = torch.cat([kept, dropped], dim=-1)
        return torch.empty_like(states).scatter_(-1, self.order[:, :, None].expand(states.shape), states)

    def rows(self, kept: Tensor, dropped: Tensor) -> Tensor:
        """The rows of tokens, [B, H, m, n - d]."""
        if self.matrix is None or self.constant is None:
            return dropped
        return dropped - kept @ self.matrix.mT - self.constant

    def append(self, states: Tensor, at: int | Tensor) -> Tensor:
        """Store tokens [B, H, m, n] from position ``at`` on; returns their rows."""
        kept, dropped = self.split(states)
        self.store.append(kept, at)
        return self.rows(kept, dropped)

    def asked(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, H, m, n] as they meet the kept channels of keys, and the rows of whole tokens."""
        kept, dropped = self.split(query)
        return (kept if self.matrix is None else kept + dropped @ self.matrix), dropped

    def scores(self, asked: Tensor) -> Tensor:
        """Products [B, H, m, T] of asked queries [B, H, m, d] with the kept channels of all tokens."""
        parts = [asked @ part.mT for part in self.store.parts()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def mixed(self, weights: Tensor) -> Tensor:
        """Sums [B, H, m, d] of the kept channels of all tokens with weights [B, H, m, T]."""
        total, low = None, 0
        for part in self.store.parts():
            each = weights[..., low : low + part.shape[2]] @ part
            total = each if total is None else total + each
            low += part.shape[2]
        assert total is not None
        return total

    def read(self, mixed: Tensor, rows: Tensor | None) -> Tensor:
        """Outputs [B, H, m, n] from the sums over kept channels, and over the rows of whole tokens."""
        if self.order is None:
            return mixed
        dropped = mixed.new_zeros(*mixed.shape[:-1], self.order.shape[-1] - self.width) if rows is None else rows
        if self.matrix is not None and self.constant is not None:
            dropped = dropped + mixed @ self.matrix.mT + self.constant
        return self.merge(mixed, dropped)

    def tensors(self) -> list[Tensor]:
        """Every tensor that is held for tokens; a selection of its own for each prompt counts too."""
        own = [self.order] if self.per_prompt else []
        held = [self.window, self.sinks, self.matrix, self.constant, *self.store.tensors(), *own]
        return [tensor for tensor in held if tensor is not None]

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor that has a row for each prompt."""
        self.store.each(change)
        self.window, self.sinks = change(self.window), change(self.sinks)
        if self.matrix is not None and self.constant is not None:
            self.matrix, self.constant = change(self.matrix), change(self.constant)
        if self.order is not None and self.order.shape[0] > 1:
            self.order = change(self.order)
