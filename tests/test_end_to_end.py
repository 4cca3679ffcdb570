"""The whole path on the real SmolLM2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from transformers import DynamicCache

import grace_opt.runtime
from grace_opt import Calibration, GraphBundle, calibrate, load_mask, mask_from_solutions, save_mask, solve_many
from grace_opt.models.texts import read_pieces
from grace_opt.runtime.generate import forced, kl_per_token
from tests.support.generation import steps
from tests.support.reference import greedy_by_objective, use_zero_channel_attention
from tests.support.slack import assert_logits, logit_slack

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def bundle(smollm2: tuple[Any, Any]) -> GraphBundle:
    model, tokenizer = smollm2
    return calibrate(model, tokenizer, read_pieces(None), Calibration(tokens=512), model_name="smollm2-135m")


@pytest.fixture(scope="module")
def prompt(smollm2: tuple[Any, Any]) -> Any:
    """Two rows of real text, the second padded on the left."""
    _, tokenizer = smollm2
    import pdb
    import statistics

    tokenizer.padding_side = "left"
    texts = [(pdb.__doc__ or "")[:900], (statistics.__doc__ or "")[:400]]
    return tokenizer(texts, return_tensors="pt", padding=True)


def test_every_head_has_a_graph(bundle: GraphBundle) -> None:
    assert len(bundle.heads) == 90
    for head in bundle.heads:
        assert head.weights.shape == (64, 64)
        assert np.linalg.eigvalsh(head.weights).min() >= -1e-9 * np.abs(head.weights).max()
        assert head.protected is not None
        assert 3 <= head.protected.sum() <= 12


def test_greedy_equals_the_plain_loop_on_every_head(bundle: GraphBundle) -> None:
    problems = bundle.problems(0.5)
    for problem, solution in zip(problems, solve_many(problems, "greedy"), strict=True):
        assert list(solution.pruned or ()) == greedy_by_objective(problem)
        assert problem.protected is not None
        assert not problem.protected[list(solution.pruned or ())].any()


@pytest.mark.parametrize(
    ("recent_window", "sinks", "generated", "more"),
    [
        (0, 0, "prune", {}),
        (1, 4, "prune", {}),
        (32, 4, "keep", {}),
        (32, 4, "prune", {"num_beams": 2}),
        (32, 4, "prune", {"prefill_chunk_size": 100}),
        (2000, 4, "keep", {}),
    ],
)
def test_logits_equal_the_zero_channel_reference(
    smollm2: tuple[Any, Any],
    bundle: GraphBundle,
    prompt: Any,
    recent_window: int,
    sinks: int,
    generated: Any,
    more: dict[str, int],
) -> None:
    model, _ = smollm2
    solutions = solve_many(bundle.problems(0.5), "greedy")
    mask = mask_from_solutions(bundle, solutions, readout_scope="none", recent_window=recent_window, sinks=sinks)
    mask = replace(mask, plan=mask.plan.changed(generated=generated))

    def run(past: Any) -> Any:
        return model.generate(
            **prompt,
            past_key_values=past,
            max_new_tokens=12,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **more,
        )

    pruned = run(grace_opt.runtime.cache(mask, model))
    use_zero_channel_attention(model, mask)
    reference = run(DynamicCache(config=model.config))
    for ours, theirs in steps(pruned, reference, logit_slack(reference.logits)):
        assert_logits(ours, theirs)


def test_ratio_zero_gives_the_plain_models_tokens(
    smollm2: tuple[Any, Any], bundle: GraphBundle, prompt: Any, tmp_path: Any
) -> None:
    model, _ = smollm2
    save_mask(mask_from_solutions(bundle, solve_many(bundle.problems(0.0), "greedy")), tmp_path)
    model.set_attn_implementation("sdpa")
    common = {"max_new_tokens": 20, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(**prompt, **common)
    pruned = model.generate(**prompt, past_key_values=grace_opt.runtime.cache(load_mask(tmp_path), model), **common)
    for ours, theirs in steps(pruned, plain, logit_slack(plain.logits)):
        assert_logits(ours, theirs)


def test_greedy_masks_keep_the_model_closer_than_random_ones(
    smollm2: tuple[Any, Any], bundle: GraphBundle, prompt: Any
) -> None:
    model, _ = smollm2
    row = prompt["input_ids"][:1]
    solutions = solve_many(bundle.problems(0.5), "greedy")
    greedy = mask_from_solutions(bundle, solutions)
    rng = np.random.default_rng(0)
    keep = {
        layer: tuple(np.sort(rng.choice(64, 32, replace=False)).astype(np.int32) for _ in heads)
        for layer, heads in greedy.key_keep.items()
    }
    random = grace_opt.KVMask.of_channels("smollm2-135m", 3, 64, keep, generated="keep")
    full, tokens = forced(model, row, 16, None)
    divergence = {
        name: float(kl_per_token(full.logits, forced(model, row, tokens, mask.plan)[0].logits).mean())
        for name, mask in (("greedy", greedy), ("random", random))
    }
    assert divergence["greedy"] < 0.2 * divergence["random"]
    assert 0 <= divergence["greedy"] < 0.2
