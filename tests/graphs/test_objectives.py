"""Graphs, read-outs and budgets against their definitions, written out as loops."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_opt import InputError, SubsetProblem
from grace_opt.compression.budget import Savings, error_curves
from grace_opt.compression.readout import Readout, fit, moments, squared_error
from grace_opt.graphs.objectives import KEY_OBJECTIVES, VALUE_OBJECTIVES, attention, centered, logit, output
from grace_opt.graphs.observed import Observed

HEADS, GROUP, WINDOW, TOKENS, N, NV, HIDDEN = 2, 3, 4, 17, 6, 5, 11


def observed(seed: int, sinks: int = 2, recent_window: int = 3) -> Observed:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    return Observed(
        normal(HEADS * GROUP, WINDOW, N) * 2,
        normal(HEADS, TOKENS, N) + normal(HEADS, 1, N),
        normal(HEADS, TOKENS, NV),
        0.4,
        sinks,
        recent_window,
        normal(HIDDEN, HEADS * GROUP * NV),
    )


def whole(seen: Observed, query: int, token: int) -> bool:
    position = TOKENS - WINDOW + query
    return token < seen.sinks or position - token < seen.recent_window


def probabilities(seen: Observed, head: int, query: int) -> np.ndarray:
    """The softmax of one query over the tokens it may see, by definition."""
    position = TOKENS - WINDOW + query
    logits = (seen.keys[head // GROUP] @ seen.queries[head, query]).double().numpy() * seen.scaling
    weights = np.where(np.arange(TOKENS) <= position, np.exp(logits - logits.max()), 0.0)
    return np.asarray(weights / weights.sum())


def pruned_error(seen: Observed, head: int, query: int, x: np.ndarray) -> np.ndarray:
    """What pruning the channels x takes off the logits, [T], by definition; 0 where a token is whole."""
    part = (seen.keys[head // GROUP].double().numpy() * x) @ seen.queries[head, query].double().numpy()
    return np.array([0.0 if whole(seen, query, t) else part[t] for t in range(TOKENS)])


@given(seed=st.integers(0, 10_000))
@settings(max_examples=10)
def test_logit_graphs_are_squared_errors_of_the_logits(seed: int) -> None:
    seen = observed(seed)
    x = np.random.default_rng(seed).random(N) < 0.5
    old = seen.keys[:, 2:-3].double().numpy()
    for head, (plain, central) in enumerate(zip(logit(seen).numpy(), centered(seen).numpy(), strict=True)):
        queries = seen.queries[GROUP * head : GROUP * (head + 1)].double().numpy() * x
        errors = queries @ (old[head]).T
        assert x @ plain @ x == pytest.approx((errors**2).sum())
        assert x @ central @ x == pytest.approx(((errors - errors.mean(-1, keepdims=True)) ** 2).sum())


@given(seed=st.integers(0, 10_000))
@settings(max_examples=10)
def test_the_attention_graph_is_the_divergence_to_second_order(seed: int) -> None:
    seen = observed(seed)
    x = np.random.default_rng(seed).random(N) < 0.5
    for kv_head, W in enumerate(attention(seen).numpy()):
        second = exact = 0.0
        step = 1e-4
        for head, query in product(range(GROUP * kv_head, GROUP * (kv_head + 1)), range(WINDOW)):
            p, e = probabilities(seen, head, query), seen.scaling * pruned_error(seen, head, query, x)
            second += p @ e**2 - (p @ e) ** 2
            changed = p * np.exp(-step * e)
            seen_by = p > 0
            exact += float(np.sum(p[seen_by] * np.log(p[seen_by] / (changed / changed.sum())[seen_by])))
        assert x @ W @ x == pytest.approx(second, rel=1e-5, abs=1e-9)
        assert step**2 * (x @ W @ x) / 2 == pytest.approx(exact, rel=2e-2, abs=1e-13)


def test_the_output_graph_is_the_squared_error_of_the_output() -> None:
    seen = observed(3)
    assert seen.output is not None
    x = np.arange(NV) % 2 == 0
    for kv_head, W in enumerate(output(seen).numpy()):
        total = 0.0
        for head, query in product(range(GROUP * kv_head, GROUP * (kv_head + 1)), range(WINDOW)):
            p = probabilities(seen, head, query)
            p = np.array([0.0 if whole(seen, query, t) else p[t] for t in range(TOKENS)])
            read = (p @ seen.values[kv_head].double().numpy()) * x
            total += np.sum((seen.output[:, head * NV : (head + 1) * NV].double().numpy() @ read) ** 2)
        assert x @ W @ x == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("objective", [*KEY_OBJECTIVES.values(), *VALUE_OBJECTIVES.values()])
def test_graphs_are_symmetric_and_positive_semidefinite(objective: object) -> None:
    for seed in range(5):
        W = objective(observed(seed))  # type: ignore[operator]
        assert W.dtype == torch.float64
        assert torch.equal(W, W.mT)
        assert float(torch.linalg.eigvalsh(W).min()) >= -1e-5 * float(W.abs().max())


def test_a_head_without_attention_to_old_tokens_weighs_them_alike() -> None:
    seen = observed(0)
    far = Observed(seen.queries * 100, seen.keys, seen.values, 1.0, TOKENS - 4, 3)
    object.__setattr__(far, "queries", torch.zeros_like(seen.queries))
    assert far.token_weights.sum(-1) == pytest.approx(1.0)
    lonely = Observed(seen.queries, seen.keys, seen.values, 1.0, 2, 3)
    vars(lonely)["attention"] = torch.zeros(HEADS, GROUP * WINDOW, TOKENS - 5)
    assert torch.allclose(lonely.token_weights, torch.full((HEADS, TOKENS - 5), 1 / (TOKENS - 5)))


def test_windows_that_leave_nothing_are_refused() -> None:
    seen = observed(0)
    with pytest.raises(InputError, match="17 tokens have no prunable key between 9 sinks and a recent window of 8"):
        Observed(seen.queries, seen.keys, seen.values, 1.0, 9, 8)
    with pytest.raises(InputError, match="only multi-head, grouped-query and multi-query"):
        Observed(seen.queries[:5], seen.keys, seen.values, 1.0, 2, 3)


@given(
    seed=st.integers(0, 10_000),
    rank=st.integers(0, 8),
    width=st.integers(0, 8),
    ridge=st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 1e3]),
    mixing=st.sampled_from([0.0, 0.05, 1.0]),
)
@settings(max_examples=80)
def test_no_read_out_is_worse_than_zeros_in_the_error_that_it_fits(
    seed: int, rank: int, width: int, ridge: float, mixing: float
) -> None:
    rng = np.random.default_rng(seed)
    tokens = torch.tensor(rng.normal(size=(1, 30, rank)) @ rng.normal(size=(rank, 8)) + rng.normal(size=8))
    weights = torch.tensor(rng.exponential(size=(1, 30)) ** 4)
    about = moments(tokens, weights / weights.sum(), mixing)[0]
    keep = np.sort(rng.permutation(8)[:width])
    size = float(np.trace(about.covariance) + about.mean @ about.mean)
    zeros = squared_error(about, keep, None)
    mean = squared_error(about, keep, fit(about, keep, linear=False))
    try:
        linear = squared_error(about, keep, fit(about, keep, ridge=ridge))
    except np.linalg.LinAlgError:
        assert ridge == 0
        return
    assert mean <= zeros + 1e-9 * size
    if ridge > 0:
        assert linear <= mean + 1e-9 * size


def test_a_read_out_recovers_what_the_kept_channels_determine() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 7)) + 5.0
    keep = np.array([1, 4, 6])
    readout = fit(moments(torch.tensor(tokens)[None], None, 0.0)[0], keep, ridge=1e-12)
    assert isinstance(readout, Readout)
    assert readout.constant + tokens[:, keep] @ readout.matrix.T == pytest.approx(tokens[:, [0, 2, 3, 5]], abs=1e-5)


@given(seed=st.integers(0, 10_000), heads=st.integers(1, 3), floor=st.integers(0, 2), align=st.sampled_from([1, 2]))
def test_a_shared_budget_is_the_best_one_for_convex_curves(seed: int, heads: int, floor: int, align: int) -> None:
    rng = np.random.default_rng(seed)
    curves = [np.concatenate([[0.0], np.sort(rng.exponential(size=6)).cumsum()]) for _ in range(heads)]
    most = align * ((6 - floor) // align)
    total = int(rng.integers(0, heads * most // align + 1)) * align
    pruned = Savings(curves, floor=floor, align=align).at_least(total)
    assert sum(pruned) == total
    assert all(m <= most and m % align == 0 for m in pruned)
    choices = [c for c in product(range(0, most + 1, align), repeat=heads) if sum(c) == total]
    best = min(sum(curve[m] for curve, m in zip(curves, choice, strict=True)) for choice in choices)
    assert sum(curve[m] for curve, m in zip(curves, pruned, strict=True)) == pytest.approx(best)


def test_a_budget_below_the_floors_names_what_is_possible() -> None:
    with pytest.raises(
        InputError, match="2 heads that keep at least 2 channels each.* take at least 4 of 16, and 1 is asked"
    ):
        Savings([np.arange(9.0)] * 2, floor=2).at_least(15)


def test_error_curves_are_those_of_greedy() -> None:
    rng = np.random.default_rng(0)
    half = rng.normal(size=(2, 5, 8))
    problems = [SubsetProblem(h.T @ h, 0, np.arange(8) == 3 if i else None) for i, h in enumerate(half)]
    curves = error_curves(problems)
    assert [len(curve) for curve in curves] == [9, 8]
    for problem, curve in zip(problems, curves, strict=True):
        chosen = np.zeros(8, bool)
        for step in range(1, len(curve)):
            candidates = [i for i in range(8) if not chosen[i] and not (problem.protected is not None and i == 3)]
            costs = [problem.objective(chosen | (np.arange(8) == i)) for i in candidates]
            chosen[candidates[int(np.argmin(costs))]] = True
            assert curve[step] == pytest.approx(min(costs))


@given(seed=st.integers(0, 10_000), spans=st.integers(1, 6))
@settings(max_examples=10)
def test_spans_share_their_mean_attention_and_are_not_below_the_mean_over_pairs(seed: int, spans: int) -> None:
    seen = replace(observed(seed), spans=spans)
    x = np.random.default_rng(seed).random(N) < 0.5
    for kv_head, W in enumerate(attention(seen).numpy()):
        keys, total, pairs = seen.keys[kv_head, seen.prunable].double().numpy(), 0.0, 0.0
        for head in range(GROUP):
            rows = seen.attention[kv_head, head * WINDOW : (head + 1) * WINDOW].double().numpy()
            for span in range(min(spans, WINDOW)):
                members = [q for q in range(WINDOW) if q * min(spans, WINDOW) // WINDOW == span]
                mean = rows[members].mean(0)
                for q in members:
                    e = seen.scaling * (keys * x) @ seen.grouped[kv_head, head * WINDOW + q].double().numpy()
                    total += mean @ e**2 - (mean @ e) ** 2
                    pairs += np.mean([row @ e**2 - (row @ e) ** 2 for row in rows[members]])
        assert x @ W @ x == pytest.approx(total, rel=1e-5, abs=1e-9)
        assert total >= pairs - 1e-9
