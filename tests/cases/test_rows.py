"""What is done by row, not by slot: a row of a padded batch gives what it gives alone, and padding costs little."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import grace_opt.runtime
from grace_opt.compression.apply import online
from grace_opt.compression.budget import Budget
from grace_opt.compression.method import method
from grace_opt.compression.plan import CachePlan
from grace_opt.compression.tokens.base import TokenRule
from grace_opt.compression.tokens.streaming import Streaming
from tests.support.families import tiny_model
from tests.support.generation import logits_of, random_mask
from tests.support.slack import assert_logits

WINDOWS: dict[str, Any] = {"recent_window": 4, "sinks": 2}
INT4, INT8 = ({"key_bits": bits, "value_bits": bits} for bits in (4, 8))
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "channels": ("channels", {}),
    "channels, 4 bits": ("channels", INT4),
    "ragged, 4 bits": ("ragged", INT4),
    "static read-out, 8 bits": ("static", INT8),
    "read-out of the prompt, 4 bits": ("prefill", INT4),
    "whole, 4 bits": ("whole", INT4),
    "whole, 3-bit values": ("whole", {"value_bits": 3}),
    "chosen from the prompt": ("grace-opt", {}),
    "chosen with protection, 4 bits": ("grace", INT4),
    "low rank, 8 bits": ("kq-svd", INT8),
    "streaming": ("streaming", {}),
    "streaming, 4-bit keys": ("streaming", {"key_bits": 4}),
}
PADDING = [0, 37, 89]  # of prompts of 90 tokens: blocks in two rows, and no old token in the third
STEPS = [1, 9, 1, 28, 1]


@cache
def tiny() -> Any:
    # In float64 a row's keys are so nearly the same alone and in a batch that no code of an integer flips.
    return tiny_model("Llama", num_hidden_layers=2, max_position_embeddings=512, initializer_range=0.15).double()


def plan_of(name: str) -> CachePlan:
    if name in ("grace-opt", "grace", "kq-svd"):
        return online(method(name, WINDOWS), [0, 1], Budget(0.5, 0.4))
    if name in ("whole", "streaming"):
        plan = online(method("streaming", WINDOWS), [0, 1], Budget(0.4))
        tokens = TokenRule(Streaming(), 0.6) if name == "streaming" else None
        return CachePlan({i: replace(each, choice=None, tokens=tokens) for i, each in plan.layers.items()})
    readout = name if name in ("prefill", "static") else "none"
    return random_mask(tiny(), 7, values=9, readout=readout, ragged=name == "ragged", **WINDOWS).plan


def batch(padding: list[int], tokens: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 99, (len(padding), tokens), generator=torch.Generator().manual_seed(5))
    return ids, (torch.arange(tokens) >= torch.tensor(padding)[:, None]).long()


def assert_alone(row: int, together: list[Tensor], steps: list[int], alone: list[Tensor]) -> None:
    """The logits that a row got in the steps of a batch are those that it gets alone."""
    for size, ours, theirs in zip(steps, together, alone, strict=True):
        assert_logits(ours[row * size : (row + 1) * size], theirs)


@pytest.mark.parametrize("generated", ["keep", "prune"])
@pytest.mark.parametrize("case", CASES)
def test_a_row_gives_in_a_batch_what_it_gives_alone(case: str, generated: Any) -> None:
    name, options = CASES[case]
    if case == "streaming, 4-bit keys" and generated == "prune":
        return  # integers exclude a policy that slides
    plan, (ids, attended) = plan_of(name), batch(PADDING, 90 + sum(STEPS))
    past = grace_opt.runtime.cache(plan, tiny(), generated=generated, **options)
    together = logits_of(tiny(), past, [90, *STEPS], ids, attended)[1:]
    for row, padding in enumerate(PADDING):
        past = grace_opt.runtime.cache(plan, tiny(), generated=generated, **options)
        own, real = ids[row : row + 1, padding:], attended[row : row + 1, padding:]
        assert_alone(row, together, STEPS, logits_of(tiny(), past, [90 - padding, *STEPS], own, real)[1:])


@pytest.mark.parametrize("sinks", [0, 3])
def test_a_row_that_begins_in_a_later_chunk_is_packed_as_one_that_begins_in_the_first(sinks: int) -> None:
    """The first chunk of its row is padding alone; its blocks begin behind its own sinks all the same."""
    mask = random_mask(tiny(), 7, values=9, recent_window=2, sinks=sinks)
    ids, attended = batch([0, 45], 160)
    past = grace_opt.runtime.cache(mask, tiny(), **INT4)
    chunks = [40, 40, *[1] * 4, 70, 1, 1]
    together = [each[-2:] for each in logits_of(tiny(), past, chunks, ids, attended)][-2:]
    for row, own in ((0, chunks), (1, [35, *chunks[2:]])):
        past = grace_opt.runtime.cache(mask, tiny(), **INT4)
        low = 45 * row
        alone = logits_of(tiny(), past, own, ids[row : row + 1, low:], attended[row : row + 1, low:])
        assert_alone(row, together, [1, 1], alone[-2:])


@pytest.mark.parametrize("generated", ["keep", "prune"])
def test_rows_keep_their_blocks_when_a_batch_changes(generated: Any) -> None:
    """Beams change places, rows are repeated and picked, tokens are taken back; then blocks are packed again."""
    plan, (ids, attended) = plan_of("channels"), batch([0, 21, 60], 180)
    past = grace_opt.runtime.cache(plan, tiny(), generated=generated, **INT4)
    logits_of(tiny(), past, [100, 1], ids, attended)
    past.reorder_cache(torch.tensor([2, 0, 1]))
    past.batch_repeat_interleave(2)
    past.batch_select_indices(torch.tensor([5, 0, 2]))
    order, steps = [1, 2, 0], [40, 1, 1]
    past.crop(-1)
    together = logits_of(tiny(), past, steps, ids[order], attended[order])
    for row, was in enumerate(order):
        low = [0, 21, 60][was]
        past = grace_opt.runtime.cache(plan, tiny(), generated=generated, **INT4)
        alone = logits_of(tiny(), past, [100 - low, *steps], ids[was : was + 1, low:], attended[was : was + 1, low:])
        assert_alone(row, together, steps, alone[1:])


@pytest.mark.parametrize("name", ["channels", "whole"])
def test_padding_costs_no_more_than_its_own_bits(name: str) -> None:
    """After the prompt and a token later: no row's padding keeps another row from being packed, or a view alive."""
    plan, tokens = plan_of(name), 3000
    held: dict[int, list[int]] = {}
    for padding in (0, 700, 2950):
        ids, attended = batch([0, padding], tokens + 1)
        past = grace_opt.runtime.cache(plan, tiny(), **INT4)
        held[padding] = []
        for low, high in ((0, tokens), (tokens, tokens + 1)):
            with torch.inference_mode():
                tiny().model(ids[:, low:high], attention_mask=attended[:, :high], past_key_values=past)
            held[padding].append(past.nbytes)
    full = grace_opt.runtime.full_cache_nbytes(past)
    for padding, (first, second) in held.items():
        assert abs(second - first) < 0.002 * full, padding
        # A block more or less of the shorter row, and up to a block's tokens that wait as they came.
        assert first <= held[0][0] + 40 / tokens * full, padding
