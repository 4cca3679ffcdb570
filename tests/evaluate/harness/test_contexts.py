"""Contexts on compressed caches against the runtime, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import grace_opt.runtime
from grace_opt import InputError, save_mask
from grace_opt.compression.budget import Budget
from grace_opt.compression.mask_file import load_mask
from grace_opt.compression.method import method
from grace_opt.evaluate.capture import capture
from grace_opt.evaluate.harness.contexts import Contexts
from grace_opt.evaluate.trial import Trial, mask_trial
from tests.support.families import tiny_model
from tests.support.generation import random_mask

SMALL = {"recent_window": 8, "sinks": 2, "observation_window": 8, "floor": 1}
CONTEXT = np.random.default_rng(0).integers(3, 99, 121).tolist()
CONTINUATIONS = [[5], [7, 8, 9], np.random.default_rng(1).integers(3, 99, 12).tolist(), [11, 5]]


def of(name: str, share: float, **options: Any) -> Trial:
    own = {key: value for key, value in SMALL.items() if key != "floor" or name.startswith("grace-opt")}
    return Trial(name, method(name, {**own, **options}), Budget(share=share))


def by_hand(model: Any, trial: Trial, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """A user's own way: the plan's cache given to the model, and one token after the other."""
    plan = trial.plan(capture(model, context, len(context) - 1, trial.queries))
    total, greedy = 0.0, True
    with torch.inference_mode(), grace_opt.runtime.cache(plan, model) as past:
        model(torch.tensor([context[:-1]]), past_key_values=past)
        for fed, said in zip([context[-1], *continuation], continuation, strict=False):
            logs = model(torch.tensor([[fed]]), past_key_values=past).logits[0, -1].log_softmax(-1)
            total += float(logs[said])
            greedy &= int(logs.argmax()) == said
    return total, greedy


@pytest.mark.parametrize(
    ("name", "share", "options"),
    [
        ("grace-opt", 0.5, {}),
        ("grace-opt", 0.5, {"generated": "prune"}),
        ("think", 0.6, {}),
        ("streaming", 0.4, {}),
        ("svd", 0.6, {}),
        ("int4", 0.5, {}),
        ("grace-opt+int8", 0.45, {"generated": "prune"}),
    ],
)
@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_likelihoods_are_those_of_the_runtime(family: str, name: str, share: float, options: dict[str, Any]) -> None:
    share = (1 + share) / 2 if family == "Gemma3Text" else share  # one of its two layers stays as it is
    model, trial = tiny_model(family), of(name, share, **options)
    contexts = Contexts(model, trial)
    found = contexts.likelihoods(CONTEXT, CONTINUATIONS)
    assert found is not None
    for answer, continuation in zip(found, CONTINUATIONS, strict=True):
        alone = by_hand(model, trial, CONTEXT, continuation)
        assert answer[0] == pytest.approx(alone[0], abs=1e-4)
        assert answer[1] == alone[1]
    counted = contexts.counts[""].record()
    assert (counted["contexts"], counted["compressed"]) == (1, 1)
    assert counted["held_share"] <= share
    assert model.config._attn_implementation == "sdpa"


def test_the_first_token_is_read_from_what_is_stored_too() -> None:
    """Else tasks whose answers have one token would not see the compression at all."""
    model = tiny_model("Llama")
    found = Contexts(model, of("streaming", 0.2)).likelihoods(CONTEXT, [[5]])
    with torch.inference_mode():
        plain = float(model(torch.tensor([CONTEXT])).logits[0, -1].log_softmax(-1)[5])
    assert found is not None
    assert abs(found[0][0] - plain) > 1e-3


def test_a_greedy_continuation_is_known_as_one() -> None:
    model, trial = tiny_model("Llama"), of("grace-opt", 0.5)
    contexts = Contexts(model, trial)
    with contexts.cache(CONTEXT) as found:
        assert found is not None
        row = torch.tensor([CONTEXT])
        made = model.generate(
            row, attention_mask=torch.ones_like(row), past_key_values=found[1], max_new_tokens=6, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )[0, len(CONTEXT) :].tolist()  # fmt: skip
    answers = contexts.likelihoods(CONTEXT, [made, [*made[:-1], (made[-1] + 1) % 99]])
    assert answers is not None
    assert [greedy for _, greedy in answers] == [True, False]


def test_short_contexts_are_held_whole_and_counted() -> None:
    model = tiny_model("Llama")
    contexts = Contexts(model, of("grace-opt", 0.5))
    assert contexts.likelihoods(CONTEXT[:11], [[5]]) is None  # 10 tokens before the last: sinks and window
    assert contexts.unreachable is None
    assert contexts.likelihoods(CONTEXT[:16], [[5]]) is None  # old tokens, but windows take more than half
    assert "16 tokens is held whole: grace-opt: the method holds at least" in str(contexts.unreachable)
    assert contexts.likelihoods(CONTEXT, [[5]]) is not None
    record = contexts.counts[""].record()
    assert (record["contexts"], record["compressed"]) == (3, 1)
    assert record["held_share_of_compressed"] <= 0.5
    assert record["held_share"] == pytest.approx((2 + record["held_share_of_compressed"]) / 3)
    assert "1 of 3 contexts were compressed, to 0." in contexts.counts[""].sentence()
    assert contexts.counts[""].sentence().endswith("; 2 were too short and held whole")


def test_masks_narrow_ones_too(tmp_path: Any) -> None:
    model = tiny_model("Llama")
    for prefill in ("full", "pruned"):
        mask = random_mask(model, 8, recent_window=8, sinks=2, readout="static", values=8)
        mask = type(mask)(**{**vars(mask), "prefill": prefill})
        save_mask(mask, tmp_path / prefill)
        contexts = Contexts(model, mask_trial("mask", load_mask(tmp_path / prefill)))
        found = contexts.likelihoods(CONTEXT, CONTINUATIONS)
        assert found is not None
        assert contexts.counts[""].record()["held_share"] < 0.7


def test_a_mask_of_another_model_is_refused_before_anything_runs() -> None:
    mask = random_mask(tiny_model("Llama"), 8, recent_window=8, sinks=2)
    with pytest.raises(InputError, match="for keys of 16 channels, and these have 32"):
        Contexts(tiny_model("Llama", head_dim=32), mask_trial("mask", mask))
