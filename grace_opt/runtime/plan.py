"""What a cache layer keeps: the channels of a mask, or channels chosen from each prompt; and its read-outs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from grace_opt.compression.budget import Budget
from grace_opt.compression.headmaps import AXES, KINDS
from grace_opt.compression.integers import Bits, quantise
from grace_opt.compression.method import Method
from grace_opt.compression.readout import Readout, weighted_moments
from grace_opt.errors import InputError
from grace_opt.graphs.bundle import Kind
from grace_opt.graphs.objectives import KEY_OBJECTIVES, VALUE_OBJECTIVES
from grace_opt.graphs.observed import Observed, double, output_projection
from grace_opt.graphs.protection import salient_channels
from grace_opt.problem import prune_count
from grace_opt.runtime.buffers import GROUP
from grace_opt.runtime.side import Channels


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What the cache of one layer keeps of each token.

    Attributes:
        heads, head_dim: of the model's layer, as far as they are known (a plan from a mask).
        keep: kind -> int64[H, d], the kept channels of each KV head (a list of int64[d], if their numbers differ). A
            kind that is left out stays whole.
        budget: in place of ``keep``: choose the channels from each prompt, by the policy's objective and solver.
        readouts: kind -> one for each head; "prefill" to fit them to each prompt; None: dropped channels read as zeros.
        bits: kind -> integers of so many bits for the kept channels of old tokens.
        policy: how channels are chosen and read-outs are fitted.
    """

    index: int
    sinks: int
    recent_window: int
    policy: Method
    heads: int | None = None
    head_dim: int | None = None
    keep: Mapping[Kind, Any] = field(default_factory=dict)
    budget: Budget | None = None
    readouts: Mapping[Kind, Sequence[Readout]] | Literal["prefill"] | None = None
    bits: Mapping[Kind, Bits] = field(default_factory=dict)

    def part(self, heads: Sequence[int], keep: Mapping[Kind, Tensor]) -> LayerPlan:
        """The plan of some of the heads."""
        readouts = self.readouts
        if readouts is not None and readouts != "prefill":
            readouts = {kind: [each[head] for head in heads] for kind, each in readouts.items()}
        return replace(self, heads=len(heads), keep=keep, readouts=readouts)

    def check(self, keys: Tensor, values: Tensor) -> None:
        """Raise InputError if a mask does not fit a layer's keys and values [B, H, n, D]."""
        if self.heads is None:
            return
        if keys.shape[1] != self.heads or keys.shape[3] != self.head_dim:
            raise InputError(
                f"the mask has {self.heads} KV heads of {self.head_dim} channels in layer {self.index}, the model has "
                f"{keys.shape[1]} of {keys.shape[3]}; use a mask made for this model"
            )
        if "value" in self.keep and values.shape[3] != self.head_dim:
            raise InputError(
                f"the mask has value channels for heads of {self.head_dim}, and those of layer {self.index} have "
                f"{values.shape[3]}; solve keys only"
            )

    def width(self, kind: Kind, n: int) -> int:
        """How many of n channels each head keeps."""
        if kind in self.keep:
            return int(self.keep[kind].shape[1])
        if self.budget is None:
            return n
        return n - prune_count(self.budget.of(kind), n, up=self.policy.rounding == "ceil", align=self.policy.align)

    def channels(self, kind: Kind, states: Tensor) -> Channels:
        """Empty keys or values for states [B, H, _, n], with static read-outs in place."""
        n = states.shape[3]
        width, order = self.width(kind, n), None
        if kind in self.keep and width < n:
            keep = self.keep[kind]
            dropped = torch.ones(len(keep), n, dtype=torch.bool).scatter_(1, keep, False)
            order = torch.cat([keep, dropped.nonzero()[:, 1].view(len(keep), -1)], dim=1)[None].to(states.device)
        held = Channels(order, width)
        if width < n and self.readouts is not None and self.readouts != "prefill" and kind in self.readouts:
            matrix = np.array([each.matrix for each in self.readouts[kind]])
            constant = np.array([each.constant for each in self.readouts[kind]])
            rows = (len(states), -1, -1, -1)
            _set_readouts(
                held, torch.from_numpy(matrix).expand(rows), torch.from_numpy(constant).expand(rows[:3]), states
            )
        return held

    def begin(
        self,
        held: Sequence[Channels],
        states: Sequence[Tensor],
        module: Any,
        query: Tensor,
        scaling: float,
        first: Tensor,
    ) -> None:
        """Choose channels from the prompts and fit read-outs to them, all rows at once, if the plan asks for it.

        states: keys and values [B, H, T, n]; query [B, Hq, T, n]; first int64[B], where each row begins. A row without
        old tokens is read as zeros, and its channels are chosen as if all of its tokens were old.
        """
        pruned = [kind for kind, x in zip(KINDS, states, strict=True) if self.width(kind, x.shape[3]) < x.shape[3]]
        if not pruned or (self.budget is None and self.readouts != "prefill"):
            return
        keys, values = states
        output = output_projection(module, query.shape[1]) if self.budget is not None and "value" in pruned else None
        rows = []
        for row, begins in enumerate(first.tolist()):
            start = min(begins, keys.shape[2] - 1)  # a row of padding alone counts its last token
            last = max(start, keys.shape[2] - self.policy.observation_window)
            old = keys.shape[2] - start > self.sinks + self.recent_window
            seen = Observed(
                query[row, :, last:],
                keys[row, :, start:],
                values[row, :, start:],
                scaling,
                self.sinks if old else 0,
                self.recent_window if old else 0,
                output,
                self.policy.spans,
            )
            rows.append((seen, old))
        for kind, channels in zip(KINDS, held, strict=True):
            if kind not in pruned:
                continue
            if self.budget is not None:
                channels.order = self._choose(kind, [seen for seen, _ in rows], channels.width)
                channels.per_prompt = True
            if self.readouts == "prefill" and any(old for _, old in rows):
                _set_readouts(channels, *self._fit(kind, rows, channels), keys)

    def _choose(self, kind: Kind, rows: Sequence[Observed], width: int) -> Tensor:
        """int64[B, H, n]: each head's channels, the kept ones first, both in order."""
        counted = rows if self.policy.aligned else [seen.unaligned for seen in rows]
        objectives = KEY_OBJECTIVES if kind == "key" else VALUE_OBJECTIVES
        objective = objectives[self.policy.objective if kind == "key" else self.policy.value_objective]
        weights = torch.stack([objective(seen) for seen in counted])
        prune, protected = weights.shape[-1] - width, None
        if self.policy.protection is not None and kind == "key":
            norms = [double(seen.keys[:, seen.prunable]).square().sum(1).sqrt().cpu().numpy() for seen in counted]
            salient = np.array([[salient_channels(head, self.policy.protection) for head in row] for row in norms])
            if prune > (most := int((~salient).sum(-1).min())):
                raise InputError(
                    f"{prune} channels of each head are to be pruned and protection leaves {most}; prune fewer, or use "
                    "a method without protection"
                )
            protected = torch.from_numpy(salient).to(weights.device).flatten(0, 1)
        if self.policy.solver == "independent":
            weights = torch.diag_embed(weights.diagonal(dim1=2, dim2=3))
        chosen = greedy(weights.flatten(0, 1), prune, protected).view(weights.shape[:3])
        return chosen.int().argsort(dim=2, stable=True).to(rows[0].keys.device)

    def _fit(self, kind: Kind, rows: Sequence[tuple[Observed, bool]], held: Channels) -> tuple[Tensor, Tensor]:
        """B [B, H, n - d, d] and constants [B, H, n - d]; zeros for a row without old tokens."""
        assert held.order is not None
        about = []
        for row, (seen, old) in enumerate(rows):
            tokens = (seen.keys if kind == "key" else seen.values)[:, seen.prunable]
            order = held.order[min(row, len(held.order) - 1)]
            x = tokens.gather(2, order[:, None].expand(tokens.shape))
            if not old:
                x = torch.zeros_like(x)
            if kind in self.bits:  # the read-out is fitted on what is stored: kept channels as they come back
                back = quantise(x[..., : held.width], self.bits[kind], AXES[kind], GROUP).unpack()
                x = torch.cat([back, x[..., held.width :]], dim=2)
            mixing = self.policy.mixing if kind == "key" else self.policy.value_mixing
            weights = seen.token_weights if self.policy.readout == "attention" else None
            about.append(weighted_moments(x, weights, mixing))
        mean, covariance = (torch.cat(each) for each in zip(*about, strict=True))
        fitted = fit(mean, covariance, held.width, self.policy.ridge, linear=self.policy.readout != "mean")
        matrix, constant = (each.view(len(rows), -1, *each.shape[1:]) for each in fitted)
        return matrix, constant


def greedy(weights: Tensor, prune: int, protected: Tensor | None = None) -> Tensor:
    """Forward greedy of many heads at once, on their device and without waiting for it: bool[H, n], what is pruned.

    weights float64[H, n, n]; protected bool[H, n] or None. The same selection as the `greedy` solver (GRACE, arXiv
    2604.16983, algorithm 1), ties to the lowest channel. O(H m n), m steps of a few small operations.
    """
    scores = weights.diagonal(dim1=1, dim2=2).clone()
    if protected is not None:
        scores = scores.masked_fill(protected, torch.inf)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for _ in range(prune):
        pick = scores.argmin(dim=1, keepdim=True)
        chosen.scatter_(1, pick, True)
        scores += 2 * weights.gather(1, pick[..., None].expand(-1, -1, weights.shape[2]))[:, 0]
        scores.scatter_(1, pick, torch.inf)
    return chosen


def fit(mean: Tensor, covariance: Tensor, width: int, ridge: float, *, linear: bool = True) -> tuple[Tensor, Tensor]:
    """Read-outs of many heads at once, on their device and without waiting for it.

    Returns B [H, n - d, d] and constants [H, n - d], from the mean [H, n] and covariance [H, n, n], float64, of tokens
    with the kept channels first. The same as `grace_opt.compression.readout.fit`. O(H d^3).
    """
    block, both = covariance[:, :width, :width], covariance[:, :width, width:]
    if not linear or width == 0:
        return torch.zeros_like(both.mT), mean[:, width:]
    shift = ridge * block.diagonal(dim1=1, dim2=2).mean(1)
    # Where the kept channels do not vary at all, anything positive gives B = 0.
    shift = shift.clamp(min=torch.finfo(shift.dtype).tiny)[:, None, None]
    solved, _ = torch.linalg.solve_ex(block + shift * torch.eye(width).to(block), both)
    return solved.mT, mean[:, width:] - (solved.mT @ mean[:, :width, None])[..., 0]


def _set_readouts(held: Channels, matrix: Tensor, constant: Tensor, like: Tensor) -> None:
    held.matrix = matrix.to(like.device, like.dtype).contiguous()
    held.constant = constant.to(like.device, like.dtype)[:, :, None].contiguous()
