"""What a layer's attention saw of the prompts of a batch, and which of their tokens stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grace_opt.compression.plan import LayerPlan
from grace_opt.compression.tokens.base import Tier
from grace_opt.errors import InputError
from grace_opt.graphs.observed import Observed, OutputProjection
from grace_opt.models.rotary import Turn

Rows = list[tuple[Observed, bool]]


def observed(
    plan: LayerPlan,
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    scaling: float,
    first: Tensor,
    output: OutputProjection | None,
    turn: Turn | None = None,
    hidden: Tensor | None = None,
) -> Rows:
    """For each row: what its last queries saw, and whether it has old tokens.

    keys and values [B, H, T, n]; query [B, Hq, m, n], the last of the prompt, at least ``plan.queries`` of them or all;
    first int64[B], where each row begins; ``output``: the projection after the attention; ``turn``: how RoPE turned the
    keys; ``hidden`` [B, T, D]: what the attention was given, if anybody asks. A row without old tokens is looked at as
    if all of its tokens were old; one of padding alone counts its last token.
    """
    tokens, rows = keys.shape[2], []
    for row, begins in enumerate(first.tolist()):
        start = min(begins, tokens - 1)
        count = min(plan.queries, tokens - start)
        old = tokens - start > plan.windows.sinks + plan.windows.recent_window
        seen = Observed(
            query[row, :, query.shape[2] - count :],
            keys[row, :, start:],
            values[row, :, start:],
            scaling,
            plan.windows.sinks if old else 0,
            plan.windows.recent_window if old else 0,
            output,
            plan.spans,
            turn,
            None if hidden is None or output is None else output.inputs(hidden[row, start:]),
        )
        rows.append((seen, old))
    return rows


@dataclass(frozen=True, eq=False)
class Staying:
    """Which tokens of a batch's prompts stay.

    ``slots`` int64[B, S]: their positions, in order, on the right; -1 where a row has fewer. ``whole`` int64[B, K]: the
    slots of those that are whole beside sinks and window, -1 where a row has fewer.
    """

    slots: Tensor
    whole: Tensor


def staying(plan: LayerPlan, rows: Sequence[tuple[Observed, bool]], tokens: int) -> Staying | None:
    """What the layer's token policy says of the rows; None if all tokens stay. Raises InputError for a wrong answer."""
    if plan.tokens is None:
        return None
    device = rows[0][0].keys.device
    kept, whole = [], []
    for seen, old in rows:
        length = seen.keys.shape[1]
        tiers = torch.full((length,), int(Tier.WHOLE), dtype=torch.int8, device=device)
        if old:
            said = plan.tokens.policy.tiers(seen, plan.tokens.share)
            if said.shape != tiers.shape:
                raise InputError(
                    f"token policy {plan.tokens.policy.name!r} must give {length} tiers, a tier a token; got "
                    f"{tuple(said.shape)}"
                )
            tiers[seen.prunable] = said.to(tiers)[seen.prunable]
        stay = tiers.nonzero()[:, 0]
        kept.append(stay + tokens - length)
        apart = torch.zeros_like(tiers, dtype=torch.bool)
        apart[seen.prunable] = old
        whole.append((apart & (tiers == Tier.WHOLE))[stay].nonzero()[:, 0])
    size = max(map(len, kept))
    slots, places = (torch.full((len(rows), n), -1, device=device) for n in (size, max(map(len, whole))))
    for row, (stay, apart) in enumerate(zip(kept, whole, strict=True)):
        slots[row, size - len(stay) :] = stay
        places[row, : len(apart)] = apart + size - len(stay)
    return Staying(slots, places)


Index = slice | Tensor  # heads that lie side by side, or int64 of any


def index_of(heads: Tensor) -> Index:
    """What picks these heads: a slice where it can, which copies nothing."""
    first, last = int(heads[0]), int(heads[-1])
    return slice(first, last + 1) if heads.tolist() == list(range(first, last + 1)) else heads


def queries_of(heads: Index, group: int) -> Index:
    """The query heads of some KV heads."""
    if isinstance(heads, slice):
        return slice(heads.start * group, heads.stop * group)
    return (heads[:, None] * group + torch.arange(group, device=heads.device)).flatten()
