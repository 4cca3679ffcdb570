from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace_opt import InputError, SubsetProblem
from grace_opt.problem import prune_count
from tests.support.strategies import gram_weights, problems


@given(problems(), st.integers(0, 2**32 - 1))
def test_objective_equals_its_definition(problem: SubsetProblem, seed: int) -> None:
    x = np.random.default_rng(seed).random(problem.n) < 0.5
    expected = float(x @ problem.weights @ x)
    assert problem.objective(x) == pytest.approx(expected, rel=1e-9, abs=1e-9 * np.abs(problem.weights).max())
    assert problem.objective(x) == problem.objective(x.astype(int)) == problem.objective(x.astype(float))


@given(problems(largest=8, groups=False))
def test_graph_weight_of_the_pruned_subgraph_is_the_objective(problem: SubsetProblem) -> None:
    graph = problem.to_networkx()
    chosen = list(range(0, problem.n, 2))
    total = sum(graph.nodes[i]["weight"] for i in chosen)
    total += sum(data["weight"] for _, _, data in graph.subgraph(chosen).edges(data=True))
    x = np.zeros(problem.n)
    x[chosen] = 1
    assert problem.objective(x) == pytest.approx(total, rel=1e-9, abs=1e-9 * np.abs(problem.weights).max())


@given(problems())
def test_contraction_is_the_same_problem(problem: SubsetProblem) -> None:
    nodes = problem.contraction
    y = np.arange(len(nodes.sizes)) % 2 == 0
    expanded = nodes.expand(y)
    assert expanded.sum() == nodes.sizes[y].sum()
    tolerance = 1e-9 * np.abs(problem.weights).max()
    assert problem.objective(expanded) == pytest.approx(float(y @ nodes.weights @ y), rel=1e-9, abs=tolerance)


def test_feasibility() -> None:
    problem = SubsetProblem(np.eye(6), 2, protected=np.eye(6)[0], groups=np.array([0, 1, 2, 0, 1, 2]))
    assert problem.prunable == 4  # the partner of a protected channel is protected too
    assert problem.is_feasible([1, 4])
    assert not problem.is_feasible([0, 3])
    assert not problem.is_feasible([1, 2])
    assert not problem.is_feasible([1, 2, 4])
    assert not problem.is_feasible([1, 9])
    assert not problem.is_feasible([1.5, 4])
    assert problem.is_feasible([0, 1, 0, 0, 1, 0])


def test_digest_depends_on_the_problem_and_not_on_its_name() -> None:
    weights = gram_weights(np.random.default_rng(0), 6, 4, True)
    digest = SubsetProblem(weights, 2).digest()
    assert digest == SubsetProblem(weights.copy(), 2, name="other", protected=np.zeros(6, bool)).digest()
    others = [
        SubsetProblem(weights * 2, 2),
        SubsetProblem(weights, 3),
        SubsetProblem(weights, 2, protected=np.eye(6)[1]),
        SubsetProblem(weights, 2, groups=np.array([0, 0, -1, -1, -1, -1])),
    ]
    assert len({digest, *(other.digest() for other in others)}) == 5


def test_weights_are_frozen_and_the_callers_are_not() -> None:
    weights = np.eye(3)
    problem = SubsetProblem(weights, 1)
    with pytest.raises(ValueError, match="read-only"):
        problem.weights[0, 0] = 2.0
    weights[0, 0] = 2.0
    assert problem.weights[0, 0] == 1.0


NAN = np.array([[1.0, np.nan], [np.nan, 1.0]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": NAN, "prune": 1}, "2 NaN or infinite entries"),
        ({"weights": np.diag([np.inf, 1.0]), "prune": 1}, "1 NaN or infinite entries"),
        ({"weights": [[1.0, 2.0], [2.1, 1.0]], "prune": 1}, "not symmetric"),
        ({"weights": np.ones((2, 3)), "prune": 1}, "square matrix, not of shape (2, 3)"),
        ({"weights": np.ones(4), "prune": 1}, "square matrix"),
        ({"weights": [["a"]], "prune": 1}, "must be numbers"),
        ({"weights": np.eye(4), "prune": 5}, "cannot prune 5 of 4 channels, 4 are prunable"),
        ({"weights": np.eye(4), "prune": -1}, "cannot prune -1"),
        ({"weights": np.eye(4), "prune": 1.5}, "whole number of channels, not 1.5"),
        ({"weights": np.eye(4), "prune": 3, "protected": [1, 1, 0, 0]}, "cannot prune 3 of 4 channels, 2 are prunable"),
        ({"weights": np.eye(4), "prune": 1, "protected": [1, 0]}, "protected must be 4"),
        ({"weights": np.eye(4), "prune": 1, "groups": [0.5, 0, 0, 0]}, "groups must be 4 whole numbers"),
        (
            {"weights": np.eye(4), "prune": 1, "groups": [0, 0, 1, 1]},
            "prunes exactly 1 channels; the nearest count is 0",
        ),
    ],
)
def test_bad_problems_are_refused_in_a_sentence_with_their_name(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        SubsetProblem(**arguments, name="layers.7.kv_heads.1.key")
    assert str(caught.value).startswith("layers.7.kv_heads.1.key: ")
    assert "\n" not in str(caught.value)


def test_rounding_asymmetry_is_mended() -> None:
    weights = gram_weights(np.random.default_rng(1), 5, 3, True)
    bent = weights.copy()
    bent[0, 1] *= 1 + 1e-12
    assert np.array_equal(SubsetProblem(bent, 2).weights, SubsetProblem(bent, 2).weights.T)


@given(st.floats(0, 0.999), st.integers(1, 16), st.sampled_from([1, 2, 4, 8]), st.booleans())
def test_prune_count_keeps_multiples(ratio: float, units: int, align: int, up: bool) -> None:
    n = units * align
    pruned = prune_count(ratio, n, up=up, align=align)
    assert (n - pruned) % align == 0
    assert 0 <= pruned <= n - align
    if align == 1:
        assert pruned == min(n - 1, math.ceil(ratio * n - 1e-9) if up else math.floor(ratio * n + 1e-9))
    elif not up:
        assert ratio * n - align < pruned <= ratio * n + 1e-6


def test_prune_count_of_an_odd_width() -> None:
    with pytest.raises(InputError, match="heads of 60 channels cannot keep multiples of 8"):
        prune_count(0.5, 60, align=8)
