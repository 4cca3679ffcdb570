"""Caches that decode side by side say what each of them says alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from grace_opt.compression.budget import Budget
from grace_opt.compression.method import method
from grace_opt.evaluate.capture import Captured, capture, dense
from grace_opt.evaluate.trial import Trial
from grace_opt.runtime.together import decodes_together, step_together
from tests.support.families import FAMILIES, tiny_model
from tests.support.slack import assert_logits

SMALL = {"recent_window": 8, "sinks": 2, "observation_window": 8, "floor": 1}
HALF = Budget(0.5, 0.5)


def caches(captured: Captured) -> list[Any]:
    """Dense, one width, widths of their own, integers, tokens dropped, low rank."""
    methods = [
        method("think", SMALL),
        method("grace-opt", SMALL),
        method("grace-opt+int4", SMALL),
        method("streaming", SMALL),
        method("svd", SMALL),
    ]
    trials = [Trial(f"{i}", each, HALF) for i, each in enumerate(methods)]
    return [dense(captured), *(each.cache(captured, each.plan(captured)) for each in trials)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_rows_of_any_length_and_kind_say_what_they_say_alone(family: str) -> None:
    model = tiny_model(family)
    ids = np.random.default_rng(1).integers(3, 99, 90).tolist()
    prompts = [capture(model, ids[:length], length, 8) for length in (90, 61)]
    alone, side_by_side = ([past for each in prompts for past in caches(each)] for _ in range(2))
    assert decodes_together(model, side_by_side)
    tokens = [5 + i for i in range(len(alone))]
    for _ in range(12):  # past the recent window
        expected = []
        with torch.inference_mode():
            for past, token in zip(alone, tokens, strict=True):
                expected.append(model(torch.tensor([[token]]), past_key_values=past, use_cache=True).logits[0, -1])
        found = step_together(model, side_by_side, tokens)
        assert_logits(found, torch.stack(expected))
        tokens = [3 + (7 * token) % 90 for token in tokens]
    assert [past.get_seq_length() for past in side_by_side] == [past.get_seq_length() for past in alone]
    for past in side_by_side + alone:
        getattr(past, "release", lambda: None)()
    assert model.config._attn_implementation == "sdpa"
