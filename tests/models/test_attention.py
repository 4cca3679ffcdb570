"""Models are left as they were found."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

import grace_opt.runtime
from grace_opt.models.attention import attending_with, switch
from tests.support.families import tiny_model
from tests.support.generation import random_mask


def test_a_cache_gives_the_model_back() -> None:
    model = tiny_model("Llama")
    mask = random_mask(model, 6, recent_window=3, sinks=1)
    before = model.config._attn_implementation
    with grace_opt.runtime.cache(mask, model) as past:
        assert model.config._attn_implementation == "grace_opt"
        past.release()
        assert model.config._attn_implementation == before
        past.release()  # once is enough
    with pytest.raises(ZeroDivisionError), grace_opt.runtime.cache(mask, model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == before
    past = grace_opt.runtime.cache(mask, model)
    twin = copy.deepcopy(past)
    past.release()
    assert model.config._attn_implementation == "grace_opt"  # the copy is in use
    del twin, past
    gc.collect()
    assert model.config._attn_implementation == before


def test_several_are_taken_back_in_any_order() -> None:
    model, other = tiny_model("Llama"), tiny_model("Qwen3")
    mask = random_mask(model, 6, recent_window=3, sinks=1)
    before = model.config._attn_implementation
    first, second = (grace_opt.runtime.cache(mask, model) for _ in range(2))
    with attending_with(model, lambda *_: None):
        first.release()
        assert model.config._attn_implementation == "grace_opt_any"
    assert model.config._attn_implementation == "grace_opt"
    assert other.config._attn_implementation == before
    second.release()
    assert model.config._attn_implementation == before


def test_what_somebody_else_set_is_left_alone() -> None:
    model = tiny_model("Llama")
    back = switch(model, "grace_opt")
    model.set_attn_implementation("eager")
    back()
    assert model.config._attn_implementation == "eager"


def test_evaluation_and_calibration_leave_no_trace() -> None:
    from grace_opt.evaluate.capture import capture

    model = tiny_model("Llama")
    model.set_attn_implementation("eager")
    capture(model, torch.randint(3, 99, (60,)).tolist(), 50, 8)
    assert model.config._attn_implementation == "eager"
