"""A share of the bytes: what a prompt's real cache holds is under it, and as near to it as one step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from grace_opt import InputError
from grace_opt.compression.budget import Budget
from grace_opt.compression.method import METHODS, Method, method, require_effect
from grace_opt.compression.plan import Choice
from grace_opt.evaluate.capture import Captured, capture
from grace_opt.evaluate.replay import replay
from grace_opt.evaluate.trial import Trial
from grace_opt.runtime.cache import cache_nbytes
from tests.support.families import tiny_model

LENGTH = 400
IDS = np.random.default_rng(0).integers(3, 99, LENGTH + 4).tolist()
SMALL = {"recent_window": 8, "sinks": 2, "observation_window": 8}


@pytest.fixture(scope="module")
def captured() -> Captured:
    return capture(tiny_model("Llama"), IDS, LENGTH, 16)


def held(captured: Captured, made: Method, share: float) -> float:
    plan = Trial("any", made, Budget(share=share)).plan(captured)
    with replay(captured, plan) as past:
        return cache_nbytes(past) / cache_nbytes(captured.past)


@pytest.mark.parametrize("share", [0.9, 0.7, 0.55])
@pytest.mark.parametrize(
    ("name", "options", "step"),
    [  # the tiny model's heads have 16 channels: where all prune the same, a step is a sixteenth
        *((name, {}, 0.02 if METHODS[name].sharing.budget == "shared" else 0.07) for name in METHODS),
        ("think", {"align": 4}, 0.27),
        ("grace-opt", {"readout_fit": "mean", "floor": 1}, 0.02),
        ("grace-opt", {"tokens": "streaming", "token_share": 0.5}, 0.02),  # its tokens stay whole
        ("svd", {"align": 2}, 0.14),
    ],
)
def test_what_is_held_is_just_under_the_share(
    captured: Captured, name: str, options: dict[str, Any], step: float, share: float
) -> None:
    found = held(captured, method(name, {**SMALL, **options}), share)
    assert found <= share
    if options.get("token_share", 1) > share:  # fewer tokens hold less than that as they are
        assert found > share - step


@pytest.mark.parametrize("name", [*METHODS, "grace-opt+int4"])
def test_in_16_bits_rows_count_with_their_room(name: str) -> None:
    model = tiny_model("Llama", hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    captured = capture(model.to(torch.bfloat16), IDS, LENGTH, 16)
    for share in (0.75, 0.5):
        found, most = (held(captured, method(name, SMALL), each) for each in (share, 1.0))
        assert min(share, most) - 0.13 < found <= share  # where all heads are cut alike, 8 channels of 64 are a step


@pytest.mark.parametrize("name", ["int8", "int4", "grace-opt+int8", "grace-opt+int2", "svd+int4"])
def test_integers_count_with_their_scales(captured: Captured, name: str) -> None:
    least = held(captured, method(name, SMALL), 1.0)
    assert least < 0.5 if name != "grace-opt+int8" else least < 0.6
    if "+" in name:  # the rest of the budget takes channels
        found = held(captured, method(name, SMALL), 0.9 * least)
        assert 0.7 * least < found <= 0.9 * least


@pytest.mark.parametrize(("kinds", "other"), [(("key",), "value"), (("value",), "key")])
@pytest.mark.parametrize("name", ["think", "grace-opt", "svd"])
def test_a_share_of_one_kind_prunes_nothing_of_the_other(captured: Captured, name: str, kinds: Any, other: Any) -> None:
    trial = Trial("any", method(name, SMALL), Budget(share=0.8, kinds=kinds))
    plan = trial.plan(captured)
    assert not plan.widths(other)
    assert max(map(max, plan.widths(kinds[0]).values())) <= 16
    with trial.cache(captured, plan) as past:
        assert 0.7 < cache_nbytes(past) / cache_nbytes(captured.past) <= 0.8


def test_a_whole_share_compresses_nothing(captured: Captured) -> None:
    assert held(captured, method("think", SMALL), 1.0) <= 1.0


@pytest.mark.parametrize(
    ("name", "options", "share"),
    [
        ("think", {}, 0.01),
        ("grace-opt", {"floor": 12}, 0.5),
        ("streaming", {"recent_window": 350}, 0.5),
        ("int8", {}, 0.1),
    ],
)
def test_a_share_that_cannot_be_is_refused_with_the_least(
    captured: Captured, name: str, options: dict[str, Any], share: float
) -> None:
    made = method(name, {**SMALL, **options})
    with pytest.raises(InputError, match=r"holds at least 0?\.\d+ of the uncompressed bytes") as caught:
        held(captured, made, share)
    least = float(str(caught.value).split("at least ")[1].split()[0])
    assert share < held(captured, made, least) <= least


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_is_a_fraction(share: float) -> None:
    with pytest.raises(InputError, match="above 0 and at most 1"):
        Budget(share=share)


def test_what_is_made_without_a_prompt_takes_no_share() -> None:
    with pytest.raises(InputError, match="a layer's choice is made without one"):
        Choice(METHODS["think"], Budget(share=0.5))


def test_integers_alone_have_no_other_budget() -> None:
    require_effect(method("int4"), {}, [Budget(share=0.5)])
    for budget in (Budget(0.5), Budget(bytes_per_token=100)):
        with pytest.raises(InputError, match="give a share"):
            require_effect(method("int4"), {}, [budget])


def test_names_are_composed() -> None:
    made = method("think+int8", {"sinks": 2})
    assert (made.key_bits, made.value_bits, made.windows.sinks) == (8, 8, 2)
    assert made.selection == METHODS["think"].selection
    assert method("int3").codec == "whole"
    for name in ("thnk+int8", "think+int5", "int4+think", "+int4+", "int4+int4"):
        with pytest.raises(InputError, match="unknown method|not composed in order"):
            method(name)
