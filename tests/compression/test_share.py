"""A share that a bundle is solved for is what the mask's real cache holds, all its bytes counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from grace_opt import Calibration, InputError, calibrate, mask_from_solutions, problems_of, solve_many
from grace_opt.compression.budget import Budget
from grace_opt.compression.method import method
from grace_opt.evaluate.capture import Captured, capture, dense
from grace_opt.evaluate.replay import replay
from grace_opt.graphs.bundle import GraphBundle
from grace_opt.runtime.cache import cache_nbytes
from tests.support.families import ByteTokenizer, tiny_model

TOKENS = 240
IDS = np.random.default_rng(0).integers(3, 99, TOKENS).tolist()


@pytest.fixture(scope="module")
def captured() -> Iterator[Captured]:
    with torch.inference_mode():
        yield capture(tiny_model("Llama").to(torch.bfloat16), IDS, TOKENS, 8)


@pytest.fixture(scope="module")
def bundle() -> GraphBundle:
    options = Calibration(tokens=192, window=64, recent_window=8, sinks=2, value_objective="output")
    return calibrate(tiny_model("Llama"), ByteTokenizer(), ["hello world, this is a text " * 20], options)


def share_of(captured: Captured, plan: Any) -> float:
    with torch.inference_mode(), replay(captured, plan) as past:
        return cache_nbytes(past) / cache_nbytes(dense(captured))


@pytest.mark.parametrize("scope", ["none", "prefill", "static"])
@pytest.mark.parametrize("options", [{}, {"key_bits": 4, "value_bits": 8}], ids=str)
def test_what_a_masks_cache_holds_is_the_share(
    bundle: GraphBundle, captured: Captured, scope: str, options: dict[str, Any]
) -> None:
    chosen = method("grace-opt", {"floor": 1, **options})
    whole = {"recent_window": 16, "sinks": 3}
    most = None  # what is held with nothing pruned
    for share in (1.0, 0.85, 0.7):
        budget = Budget(share=share, tokens=TOKENS)
        problems = problems_of(bundle, chosen, budget, readout_scope=scope, **whole)
        mask = mask_from_solutions(bundle, solve_many(problems, "greedy"), chosen, readout_scope=scope, **whole)
        held = share_of(captured, mask.plan)
        most = most or held
        assert (
            min(share, most) - 0.09 < held <= share
        )  # rows take the room of 8 or 16 channels, and integers that of any


def test_only_what_may_be_pruned_is(bundle: GraphBundle) -> None:
    chosen = method("grace-opt", {"floor": 1})
    problems = problems_of(bundle, chosen, Budget(share=0.9, tokens=TOKENS, kinds=("value",)))
    pruned = {
        kind: sum(p.prune for p, h in zip(problems, bundle.heads, strict=True) if h.kind == kind)
        for kind in ("key", "value")
    }
    assert pruned["key"] == 0
    assert pruned["value"] > 0


def test_a_share_that_cannot_be_reached_names_the_least(bundle: GraphBundle) -> None:
    chosen = method("grace-opt", {"floor": 4})
    with pytest.raises(InputError, match="at least 0.5[0-9]* of the uncompressed bytes .* and 0.2 is asked for"):
        problems_of(bundle, chosen, Budget(share=0.2, tokens=TOKENS), readout_scope="static")
    keys = GraphBundle([head for head in bundle.heads if head.kind == "key"], bundle.metadata)
    with pytest.raises(InputError, match="no graphs of what is to be pruned; calibrate with --value-objective"):
        problems_of(keys, chosen, Budget(share=0.9, kinds=("value",)))
    with pytest.raises(InputError, match="must have from 1 to"):
        Budget(share=0.5, tokens=0)
