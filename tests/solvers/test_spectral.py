"""The relaxation on the sphere: its minimum, its gradient, and a bound that holds."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_opt import Limits, SubsetProblem, load_bundle, solve
from grace_opt.problem import FloatArray
from grace_opt.solution import BoundKind, Limit
from grace_opt.testing import brute_force
from grace_solvers import spectral
from grace_solvers.parts.convex import convex_bound, convexified
from grace_solvers.parts.dual import Root, diagonal_shift, root
from grace_solvers.parts.undecided import Core, core_of
from tests.support import DATA
from tests.support.slack import assert_encloses
from tests.support.strategies import gram_weights, problems


def slack(problem: SubsetProblem) -> float:
    return 1e-11 * float(np.abs(problem.weights).sum())


@given(problem=problems(largest=10))
@settings(max_examples=60)
def test_the_bound_is_below_the_optimum(problem: SubsetProblem) -> None:
    optimum = brute_force(problem)[0]
    with pytest.MonkeyPatch.context() as patch:  # nothing decided at the root, so that the sphere has all to do
        patch.setattr(spectral, "root", loose_root)
        for solution in (solve(problem, "spectral"), solve(problem, "spectral", options={"iterations": 1})):
            assert not solution.warnings
            assert solution.bound_kind is BoundKind.PROVEN
            assert solution.lower_bound <= optimum + slack(problem)
            assert solution.objective >= optimum - slack(problem)


def loose_root(core: Core, cutoff: float, deadline: float, improve: object) -> Root:
    return root(core, cutoff + 1e3 * float(np.abs(core.weights).sum()), deadline, improve)  # type: ignore[arg-type]


@given(seed=st.integers(0, 2**32 - 1), k=st.integers(2, 12), definite=st.booleans(), tied=st.booleans())
@settings(max_examples=60)
def test_the_minimum_over_the_sphere_is_one(seed: int, k: int, definite: bool, tied: bool) -> None:
    """It lies on both equations, no other point there is lower, and its multiplier makes the same bound."""
    rng = np.random.default_rng(seed)
    core = random_core(rng, k, definite, tied)
    sphere = spectral._Sphere(core)
    z = rng.normal(size=core.k)
    value, gradient = sphere.minimum(z)
    ends = sphere.p0 + sphere.radius * on_the_sphere(rng, sphere, 200)
    B = sphere.weights - np.diag(z)
    constant = core.weights.sum() / 4 + sphere.d @ z / 4
    scale = np.abs(core.weights).sum() + sphere.d @ np.abs(z)
    assert value <= (constant + ((ends @ B) * ends).sum(1) + ends @ sphere.linear).min() + 1e-9 * scale
    # y - y^2 weighted by d sums to zero on the sphere, whatever y is.
    assert abs(gradient.sum()) <= 1e-6 * sphere.d.sum()
    Q, linear = convexified(core, sphere.shift)
    assert convex_bound(core, Q, linear, precision=1e-9).value >= value + core.constant - 1e-6 * scale


def random_core(rng: np.random.Generator, k: int, definite: bool, tied: bool) -> Core:
    groups = np.repeat(np.arange(k), rng.integers(1, 4, k)) if tied else np.arange(k)
    sizes = np.bincount(groups)
    prune = int(sizes[rng.permutation(k)[: rng.integers(1, k)]].sum())
    core = core_of(SubsetProblem(gram_weights(rng, len(groups), 6, definite), prune, None, groups))
    return core if core.k else random_core(rng, k, definite, tied)


def on_the_sphere(rng: np.random.Generator, sphere: spectral._Sphere, points: int) -> FloatArray:
    directions = rng.normal(size=(points, len(sphere.d)))
    directions -= np.outer(directions @ sphere.p0, sphere.p0) / max(sphere.p0 @ sphere.p0, 1e-300)
    normal = sphere._reflect(np.eye(len(sphere.d))[0])
    directions -= np.outer(directions @ normal, normal)
    norms = np.linalg.norm(directions, axis=1, keepdims=True)
    return np.asarray(directions / np.where(norms > 1e-9, norms, np.inf))


def test_the_gradient_is_that_of_the_minimum() -> None:
    rng = np.random.default_rng(3)
    sphere = spectral._Sphere(random_core(rng, 9, True, False))
    z, direction = rng.normal(size=(2, len(sphere.d)))
    ahead, behind = sphere.minimum(z + 1e-6 * direction)[0], sphere.minimum(z - 1e-6 * direction)[0]
    assert (ahead - behind) / 2e-6 == pytest.approx(sphere.minimum(z)[1] @ direction, rel=1e-5)


@pytest.mark.parametrize("weights", [np.eye(6), np.ones((6, 6)), np.zeros((6, 6)), -np.eye(6)], ids=str)
def test_the_hard_case_has_a_minimum_too(weights: FloatArray) -> None:
    """All directions are alike, so that the linear part alone cannot reach the sphere."""
    core = core_of(SubsetProblem(weights, 2))
    optimum = brute_force(SubsetProblem(weights, 2))[0]
    assert core.scale * spectral._Sphere(core).minimum(np.zeros(6))[0] == pytest.approx(optimum, abs=1e-12)
    solution = solve(SubsetProblem(weights, 2), "spectral")
    assert solution.objective == optimum
    assert solution.lower_bound == pytest.approx(optimum, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("name", ["heads-smollm2-135m", "heads-qwen2.5-coder-1.5b"])
def test_steps_lift_the_bound_on_real_heads(name: str) -> None:
    for problem in load_bundle(DATA / f"{name}.safetensors").problems(0.6):
        ours = solve(problem, "branch-and-bound")
        short = solve(problem, "spectral", options={"iterations": 5})
        long = solve(problem, "spectral")
        core = core_of(problem)
        Q, linear = convexified(core, diagonal_shift(core))
        cheap = core.scale * convex_bound(core, Q, linear).value
        assert cheap <= short.lower_bound * 1.001  # bounds are computed to 1e-3
        assert short.lower_bound <= long.lower_bound * 1.001
        assert_encloses(long, ours, problem)
        assert long.lower_bound >= 0.75 * ours.objective
        assert long.objective <= 1.01 * ours.objective


def test_limits_end_the_ascent() -> None:
    problem = load_bundle(DATA / "heads-qwen2.5-coder-1.5b.safetensors").problems(0.6)[0]
    few = solve(problem, "spectral", limits=Limits(iteration_limit=2))
    assert few.limit is Limit.ITERATION
    assert few.lower_bound < solve(problem, "spectral").lower_bound
    none = solve(problem, "spectral", limits=Limits(time_limit=0.0))
    assert none.limit is Limit.TIME
    assert -np.inf < none.lower_bound < none.objective


def test_the_ascent_looks_at_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    core = core_of(load_bundle(DATA / "heads-smollm2-135m.safetensors").problems(0.6)[0])
    assert partial(spectral.sphere_shift, iterations=50)(core, 1.0, np.inf)[1] > 1
    assert spectral.sphere_shift(core, 1.0, 0.0, 50)[1] == 1
