"""Methods against independent implementations, mask for mask, and budgets by their bytes."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_opt import InputError, SubsetProblem
from grace_opt.compression.apply import apply
from grace_opt.compression.budget import Allotment, Budget, Sharing
from grace_opt.compression.method import METHODS, Method, Windows, from_options, method
from grace_opt.compression.readout import fit, moments, squared_error
from grace_opt.evaluate.capture import capture
from grace_opt.evaluate.replay import replay
from grace_opt.graphs.observed import Observed
from grace_opt.runtime.cache import cache_nbytes
from tests.support.observed import LAYERS, observed_layers


def kept(plan: Any, kind: Any = "key") -> dict[int, list[list[int]]]:
    return {i: [codec.keep.tolist() for codec in each.codecs[kind]] for i, each in plan.layers.items()}


# ---------------------------------------------------------------- independent implementations


def think_reference(seen: Observed, ratio: float) -> list[list[int]]:
    """ThinK as its authors' code has it: mean q^2 over the last queries and the group, times mean k^2 over all keys."""
    heads, _, n = seen.keys.shape
    result = []
    for head in range(heads):
        group = seen.queries.shape[0] // heads
        asked = np.zeros(n)
        for g in range(head * group, (head + 1) * group):
            asked += (seen.queries[g].double().numpy() ** 2).mean(0) / group
        score = asked * (seen.keys[head].double().numpy() ** 2).mean(0)
        dropped = sorted(range(n), key=lambda channel: (score[channel], channel))[: int(n * ratio)]
        result.append([channel for channel in range(n) if channel not in dropped])
    return result


def grace_reference(seen: Observed, ratio: float, a: float = 0.05, b: float = 0.20) -> list[list[int]]:
    """GRACE by its text: protect salient channels, then prune the channel that adds least to the logits' error."""
    heads, _, n = seen.keys.shape
    group = seen.queries.shape[0] // heads
    result = []
    for head in range(heads):
        K = seen.keys[head].double().numpy()
        Q = np.concatenate([seen.queries[g].double().numpy() for g in range(head * group, (head + 1) * group)])
        norms = [math.sqrt(float((K[:, channel] ** 2).sum())) for channel in range(n)]
        salient = sum(norm > np.mean(norms) + np.std(norms) for norm in norms) / n
        protect = int(min(max(salient, a), b) * n + 1e-9)
        protected = sorted(range(n), key=lambda channel: (-norms[channel], channel))[:protect]
        pruned: list[int] = []
        while len(pruned) < min(math.ceil(ratio * n), n - protect):

            def error(channel: int, so_far: list[int] = pruned, Q: Any = Q, K: Any = K) -> float:
                gone = [*so_far, channel]
                return float(((Q[:, gone] @ K[:, gone].T) ** 2).sum())

            pruned.append(min((c for c in range(n) if c not in pruned and c not in protected), key=error))
        result.append([channel for channel in range(n) if channel not in pruned])
    return result


@given(seed=st.integers(0, 10_000), ratio=st.sampled_from([0.1, 0.3, 0.5, 0.6, 0.8]))
@settings(max_examples=15)
def test_think_and_grace_equal_independent_implementations_mask_for_mask(seed: int, ratio: float) -> None:
    layers = observed_layers(seed)
    for name, reference in (("think", think_reference), ("grace", grace_reference)):
        ours = kept(apply(METHODS[name], layers, Budget(ratio)))
        assert ours == {i: reference(seen, ratio) for i, seen in layers.items()}, name


@pytest.mark.model
def test_think_and_grace_on_the_real_model(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    captured = capture(model, real_ids(tokenizer, 400), 390, 32)
    layers = {i: seen for i, seen in captured.observed(32, Windows(), None).items() if i in (0, 7, 29)}
    for name, reference in (("think", think_reference), ("grace", grace_reference)):
        ours = kept(apply(METHODS[name], layers, Budget(0.6)))
        assert ours == {i: reference(seen, 0.6) for i, seen in layers.items()}, name


def test_think_scores_values_by_what_attention_returns() -> None:
    layers = observed_layers(3)
    ours = kept(apply(METHODS["think"], layers, Budget(0, 0.5)), "value")
    for i, seen in layers.items():
        heads, tokens, _n = seen.keys.shape
        group, width = seen.queries.shape[0] // heads, seen.queries.shape[1]
        for head in range(heads):
            score = np.zeros(seen.values.shape[2])
            for g in range(head * group, (head + 1) * group):
                logits = seen.queries[g].double() @ seen.keys[head].double().mT * seen.scaling
                future = torch.arange(tokens) > torch.arange(tokens - width, tokens)[:, None]
                returned = logits.masked_fill(future, -torch.inf).softmax(-1) @ seen.values[head].double()
                score += (returned.numpy() ** 2).sum(0)
            assert ours[i][head] == sorted(np.argsort(score)[len(score) // 2 :].tolist())


# ---------------------------------------------------------------- budgets


def test_ratios_prune_what_they_say() -> None:
    layers = observed_layers(0)
    n = LAYERS["n"]
    for name, count in (("think", math.floor(0.55 * n)), ("grace", math.ceil(0.55 * n)), ("svd", math.floor(0.55 * n))):
        widths = apply(METHODS[name], layers, Budget(0.55)).widths("key")
        assert {width for heads in widths.values() for width in heads} == {n - count}, name
    widths = apply(METHODS["grace-opt"], layers, Budget(0.55)).widths("key")
    heads = [width for each in widths.values() for width in each]
    assert sum(heads) == len(heads) * n - math.floor(0.55 * n * len(heads))
    assert min(heads) >= METHODS["grace-opt"].sharing.floor
    assert len(set(heads)) > 1  # it does share


def test_align_and_floor_hold_for_every_head() -> None:
    layers = observed_layers(0)
    policy = method("grace-opt", {"align": 4, "floor": 8})
    widths = [w for heads in apply(policy, layers, Budget(0.3)).widths("key").values() for w in heads]
    assert all(w % 4 == 0 and w >= 8 for w in widths)
    assert sum(widths) == len(widths) * LAYERS["n"] - 28  # floor(.3 of 96), a multiple of 4
    with pytest.raises(InputError, match="lower the floor"):
        apply(policy, layers, Budget(0.8))
    with pytest.raises(InputError, match="change align"):
        apply(method("grace-opt", {"align": 5}), layers, Budget(0.3))


@pytest.mark.parametrize("name", ["grace-opt", "think", "kq-svd"])
def test_a_budget_in_bytes_is_kept_and_shared_between_keys_and_values(name: str) -> None:
    layers = observed_layers(1)
    heads, element = LAYERS["heads"] * len(layers), 4
    full = heads * element * (LAYERS["n"] + LAYERS["nv"])
    plan = apply(METHODS[name], layers, Budget(bytes_per_token=0.6 * full))
    held = sum(element * width for kind in ("key", "value") for w in plan.widths(kind).values() for width in w)
    assert 0.5 * full < held <= 0.6 * full
    with pytest.raises(InputError, match="below the floors: .* take at least 192 of 672, and 1 is asked"):
        apply(method("grace-opt"), layers, Budget(bytes_per_token=1))


def test_a_uniform_budget_in_bytes_counts_what_stays_whole() -> None:
    layers = observed_layers(1)
    whole = LAYERS["heads"] * len(layers) * 4 * (LAYERS["n"] + LAYERS["nv"])
    problems = {
        "key": [SubsetProblem(np.eye(16), 0, name=f"layers.{i}.kv_heads.{h}.key") for i in layers for h in (0, 1)]
    }
    sharing = Sharing(budget="uniform")
    costs: Any = {"key": 4.0, "value": 4.0}
    allotment = Allotment(problems, sharing, queries=1, costs=costs, whole=whole)
    keys_only = allotment.of(Budget(bytes_per_token=0.7 * whole))
    assert set(keys_only["key"]) == {9}  # ceil(.3 of 28 channels)
    with pytest.raises(InputError, match="takes at least 312 of 672 bytes if every head prunes the same"):
        allotment.of(Budget(bytes_per_token=0.4 * whole))


def test_bytes_of_integers_are_shared_by_what_they_save() -> None:
    layers = observed_layers(1)
    policy = method("grace-opt", {"key_bits": 3, "value_bits": 2})
    heads = LAYERS["heads"] * len(layers)
    full = heads * (LAYERS["n"] * 4 / 8 + LAYERS["nv"] * 3 / 8)
    plan = apply(policy, layers, Budget(bytes_per_token=0.7 * full))
    keys, values = (sum(w for each in plan.widths(kind).values() for w in each) for kind in ("key", "value"))
    assert 0.7 * full - 2 < keys * 4 / 8 + values * 3 / 8 <= 0.7 * full


def test_more_to_prune_never_widens_a_head() -> None:
    layers = observed_layers(5)
    budgets = [Budget(ratio) for ratio in (0.2, 0.4, 0.6, 0.7)]
    widths = [apply(METHODS["grace-opt"], layers, budget).widths("key") for budget in budgets]
    for wide, narrow in pairwise(widths):
        assert all(a >= b for i in wide for a, b in zip(wide[i], narrow[i], strict=True))


@pytest.mark.parametrize("ratio", [-0.1, 1.0, math.nan])
def test_ratios_outside_their_range_are_refused(ratio: float) -> None:
    with pytest.raises(InputError, match="ratio must be at least 0 and below 1"):
        Budget(ratio)
    with pytest.raises(InputError, match="ratio must be at least 0 and below 1"):
        Budget(0.5, ratio)


# ---------------------------------------------------------------- policies


def test_overrides_are_parsed_checked_and_named() -> None:
    policy = method("think", {"recent_window": "128", "protection": "none", "mixing": "0.5"})
    assert (policy.windows.recent_window, policy.selection.protection, policy.readout.mixing) == (128, None, 0.5)
    assert method("grace-opt", {"key_bits": "4"}).key_bits == 4
    for name, overrides, words in (
        ("thnik", {}, "did you mean 'think'"),
        ("think", {"recent_windw": 3}, "did you mean 'recent_window'"),
        ("think", {"recent_window": "many"}, "option 'recent_window'"),
        ("think", {"sinks": -1}, "method .think.*: sinks must be from 0"),
        ("grace-opt", {"spans": 0}, "spans must be at least 1"),
        ("streaming", {"token_share": 1.5}, "token_share must be from 0 to 1"),
        ("grace-opt", {"generated": "kept"}, "option 'generated'"),
        ("grace-opt", {"codec": "chanels"}, "unknown codec 'chanels'; did you mean 'channels'"),
        ("streaming", {"tokens": "steaming"}, "unknown token policy 'steaming'; did you mean 'streaming'"),
        ("grace-opt", {"mixing": 2}, "from 0 to 1"),
        ("grace-opt", {"observation_window": 0}, "at least 1"),
        ("grace-opt", {"key_bits": 5}, "key_bits"),
    ):
        with pytest.raises(InputError, match=words):
            method(name, overrides)


def test_options_are_flat_and_say_all() -> None:
    for name, each in METHODS.items():
        options = each.options()
        assert from_options(options) == each, name
        assert {"objective", "budget", "readout_fit", "sinks", "codec", "key_bits"} <= options.keys()
    assert method("svd", {"codec_options": "basis:kq-svd"}) == METHODS["kq-svd"]
    assert Method().windows.generated == "keep"


def test_streaming_holds_as_many_bytes_as_pruning() -> None:
    layers = observed_layers(0)
    plan = apply(METHODS["streaming"], layers, Budget(0.5, 0.5))
    for each in plan:
        assert each.tokens is not None
        assert (each.tokens.policy.name, each.tokens.share, each.codecs) == ("streaming", 0.5, {})
    whole = sum(each[:, 0].nbytes for seen in layers.values() for each in (seen.keys, seen.values))
    by_bytes = apply(METHODS["streaming"], layers, Budget(bytes_per_token=0.3 * whole))
    assert all(each.tokens is not None and each.tokens.share == pytest.approx(0.3) for each in by_bytes)


def test_heads_that_nothing_attends_to_still_get_a_mask() -> None:
    layers = observed_layers(4)
    silent = {
        i: Observed(seen.queries * 0, seen.keys * 0, seen.values * 0, 0.4, 2, 3, seen.output)
        for i, seen in layers.items()
    }
    for name in ("think", "grace", "grace-opt", "kq-svd"):
        plan = apply(METHODS[name], silent, Budget(0.5, 0.5))
        for each in plan:
            tensors = [tensor for codec in each.codecs["key"] for tensor in codec.tensors().values()]
            assert tensors
            assert all(torch.isfinite(tensor).all() for tensor in tensors)


def real_ids(tokenizer: Any, count: int) -> list[int]:
    from pydoc_data.topics import topics

    return list(tokenizer(" ".join(topics[name] for name in sorted(topics)[:20]))["input_ids"][:count])


@pytest.mark.model
def test_bytes_are_what_the_tensors_of_the_real_cache_hold(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    captured = capture(model, real_ids(tokenizer, 410), 400, 32)
    layers = captured.observed(32, Windows(), 2)
    full = cache_nbytes(captured.past)
    assert full == 400 * 30 * 3 * 2 * 64 * 4
    spare = 32  # tokens that can be taken back hold their residuals too
    kept = full - (400 - 32 - spare - 4) * 30 * 3 * 32 * 4
    numbers = 30 * (3 * 64 * 8 + 8)  # the order of the channels, and where each row begins
    for options, readouts in (({"readout_fit": "none"}, 0), ({}, 30 * 3 * 32 * 33 * 4)):
        uniform = method("grace-opt", {"budget": "uniform", **options})
        with replay(captured, apply(uniform, layers, Budget(0.5))) as past:
            assert past.nbytes == kept + numbers + readouts


def test_protected_channels_count_as_kept_and_too_many_pruned_are_refused() -> None:
    protected, W = np.arange(16) < 3, np.diag(np.arange(1.0, 17))
    problems: Any = {"key": [SubsetProblem(W, 0, protected, name=f"layers.0.kv_heads.{h}.key") for h in (0, 1)]}
    costs: Any = {"key": 1.0, "value": 1.0}
    counts = Allotment(problems, Sharing(floor=4), queries=1, costs=costs, whole=64.0).of(Budget(0.75))["key"]
    assert counts == [12, 12]
    with pytest.raises(InputError, match="cannot prune 15 of 16 channels"):
        apply(METHODS["grace"], observed_layers(0), Budget(0.95))


def test_a_ridge_of_zero_is_least_squares() -> None:
    rng = np.random.default_rng(0)
    kept = rng.normal(size=(50, 3))
    tokens = torch.as_tensor(np.concatenate([kept, kept @ rng.normal(size=(3, 3))], 1)[None])
    about = moments(tokens, None, 0.0)[0]
    keep = np.arange(3)
    assert squared_error(about, keep, fit(about, keep, ridge=0.0)) < 1e-20
    singular = moments(torch.zeros(1, 5, 4), None, 0.0)[0]
    assert not fit(singular, np.arange(2), ridge=0.0).matrix.any()
