"""What a layer's attention saw of the prompts of a batch, and which of their tokens stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grace_opt.compression.plan import LayerPlan
from grace_opt.compression.tokens.base import Tier, TokenRule, compressed
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
    slots of those that are whole beside sinks and window, -1 where a row has fewer. ``stored``: of each row, the
    compressed ones by their position in the row, int64[C]; None if there are none.
    """

    slots: Tensor
    whole: Tensor
    stored: Sequence[Tensor | None]


def staying(plan: LayerPlan, rows: Rows, tokens: int) -> list[Staying] | None:
    """What the layer's token policy says of the rows, of all KV heads or, of a policy ``per_head``, of each.

    None if all tokens stay. Raises InputError for a wrong answer.
    """
    if plan.tokens is None:
        return None
    tiers = [_tiers(plan.tokens, seen, old) for seen, old in rows]
    return [_staying([row[i] for row in tiers], rows, tokens) for i in range(len(tiers[0]))]


def _tiers(rule: TokenRule, seen: Observed, old: bool) -> Tensor:
    """int8[H or 1, T]: of each token of a row."""
    heads, length = seen.keys.shape[:2]
    shape = (heads, length) if rule.policy.per_head else (1, length)
    tiers = torch.full(shape, int(Tier.WHOLE), dtype=torch.int8, device=seen.keys.device)
    if old:
        said = rule.policy.tiers(seen, rule.share)
        if said.shape != (shape if rule.policy.per_head else shape[1:]):
            each = f"{length} tiers, a tier a token" + f" of each of {heads} KV heads" * rule.policy.per_head
            raise InputError(f"token policy {rule.policy.name!r} must give {each}; got {tuple(said.shape)}")
        tiers[:, seen.prunable] = said.to(tiers)[..., seen.prunable]
    return tiers


def _staying(tiers: Sequence[Tensor], rows: Rows, tokens: int) -> Staying:
    """``tiers``: int8[T] of each row."""
    kept, whole, stored = [], [], []
    for (seen, old), of_row in zip(rows, tiers, strict=True):
        stay = of_row.nonzero()[:, 0]
        kept.append(stay + tokens - len(of_row))
        apart = torch.zeros_like(of_row, dtype=torch.bool)
        apart[seen.prunable] = old
        whole.append((apart & (of_row == Tier.WHOLE))[stay].nonzero()[:, 0])
        stored.append(compressed(of_row))
    size = max(map(len, kept))
    slots, places = (torch.full((len(rows), n), -1, device=tiers[0].device) for n in (size, max(map(len, whole))))
    for row, (stay, apart) in enumerate(zip(kept, whole, strict=True)):
        slots[row, size - len(stay) :] = stay
        places[row, : len(apart)] = apart + size - len(stay)
    return Staying(slots, places, stored)


def narrowed(rows: Rows, stay: Staying) -> Rows:
    """The same, of which graphs and read-outs count only the tokens that are compressed."""
    return [(replace(seen, stored=stored, made={}), old) for (seen, old), stored in zip(rows, stay.stored, strict=True)]
