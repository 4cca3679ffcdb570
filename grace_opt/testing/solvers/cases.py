"""Problems with known optima: small enough to enumerate, chosen for what has broken solvers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from grace_opt.problem import BoolArray, FloatArray, SubsetProblem
from grace_opt.solution import OBJECTIVE_SLACK, ROUNDING_SLACK


@dataclass(frozen=True, eq=False)
class Case:
    """A problem and its optimum.

    Attributes:
        name: the problem's name too.
        problem: n <= 14.
        optimum: x'Wx of the best selection, summed without rounding error.
        best: bool[n], one optimal selection.
        tags: ``plain``: W is positive semidefinite and nothing is tied, so that every solver must take it.
            ``generic``: no ties, the optimum is unique. ``separated``: nearly diagonal with well separated weights,
            so that any heuristic that looks at the weights finds the optimum. ``pairs``: tied groups of one size.
            ``groups``: any tied groups. ``indefinite``: W has negative eigenvalues beyond rounding.
    """

    name: str
    problem: SubsetProblem
    optimum: float
    best: BoolArray
    tags: frozenset[str]

    @property
    def slack(self) -> float:
        """What rounding may cost: 1e-12 times the sum of |W_ij| over the free channels, plus 1e-9 of the optimum."""
        return ROUNDING_SLACK * free_magnitude(self.problem) + OBJECTIVE_SLACK * abs(self.optimum)


def problems() -> list[Case]:
    """All cases, with problems of their own: what a solver writes into one does not reach the next caller."""
    return [replace(case, problem=copied(case.problem)) for case in _cases()]


def brute_force(problem: SubsetProblem) -> tuple[float, BoolArray]:
    """The optimum and one optimal selection (bool[n]), by looking at all 2^n vectors; for n up to about 14.

    It shares no code with ``grace_solvers.exhaustive``, which it must be able to judge.
    """
    x = (np.arange(1 << problem.n)[:, None] >> np.arange(problem.n) & 1).astype(bool)
    x = x[x.sum(1) == problem.prune]
    if problem.protected is not None:
        x = x[~x[:, problem.protected].any(1)]
    if problem.groups is not None:
        for label in np.unique(problem.groups[problem.groups >= 0]):
            tied = x[:, problem.groups == label]
            x = x[tied.all(1) == tied.any(1)]
    values = ((x @ problem.weights) * x).sum(1)
    lowest = x[np.argsort(values, kind="stable")[:32]]  # rounding may have changed the order of near ties
    exact = [math.fsum(problem.weights[np.ix_(chosen, chosen)].ravel()) for chosen in lowest]
    return min(exact), lowest[int(np.argmin(exact))]


def hidden_optimum(n: int) -> Case:
    """A case of any size n >= 2 whose optimum is 0 and hard to find.

    W_ij = g_i.g_j for whole-number vectors g_i in 8 dimensions; x'Wx = |sum of g_i|^2 is computed without rounding.
    The vectors of the hidden selection sum to zero. From n = 30 on other selections that do are rare.
    """
    rng = np.random.default_rng(n)
    vectors = rng.integers(-50, 51, (8, n)).astype(np.float64)
    chosen = np.zeros(n, bool)
    chosen[rng.choice(n, n // 2, replace=False)] = True
    last = int(np.flatnonzero(chosen)[-1])
    vectors[:, last] -= vectors[:, chosen].sum(1)
    problem = SubsetProblem(vectors.T @ vectors, n // 2, name=f"hidden-optimum-{n}")
    return Case(problem.name, problem, 0.0, chosen, frozenset({"plain"}))


def free_magnitude(problem: SubsetProblem) -> float:
    """The sum of |W_ij| over channels that may be pruned."""
    free = problem.contraction.free[problem.contraction.node_of]
    return float(np.abs(problem.weights[np.ix_(free, free)]).sum())


def copied(problem: SubsetProblem, factor: float = 1.0, name: str | None = None) -> SubsetProblem:
    """The same problem in arrays of its own, with its weights multiplied."""
    return SubsetProblem(
        problem.weights * factor, problem.prune, problem.protected, problem.groups, name or problem.name
    )


def permuted(problem: SubsetProblem, order: NDArray[np.int64]) -> SubsetProblem:
    """The same problem with its channels in another order."""
    return SubsetProblem(
        problem.weights[np.ix_(order, order)],
        problem.prune,
        None if problem.protected is None else problem.protected[order],
        None if problem.groups is None else problem.groups[order],
        problem.name,
    )


@cache
def _cases() -> tuple[Case, ...]:
    rng = np.random.default_rng(20)
    gram = [_head(rng, n, 2 * n) for n in (6, 9, 12, 14)]
    pairs = np.arange(12) % 6  # channels i and i + 6, as rotary embeddings tie them
    mixed_sizes = np.array([0, 0, 0, 1, 1, -1, 2, 2, -1, 3, 3, 3])
    some = np.isin(np.arange(12), (0, 3, 4, 11))
    signed = np.array([3.0, -1, 2, -2, 5, -3, 1, -4])
    blocks = np.zeros((12, 12))
    blocks[:5, :5], blocks[5:9, 5:9], blocks[9:, 9:] = _head(rng, 5, 3), _head(rng, 4, 8), _head(rng, 3, 8)
    dead = _head(rng, 12, 20)
    dead[:, [2, 7]] = dead[[2, 7]] = 0
    near_diagonal = rng.uniform(-1e-3, 1e-3, (8, 8))
    near_diagonal = near_diagonal + near_diagonal.T + np.diag([5.0, 3, 8, 1, 7, 2, 6, 4])
    symmetric = rng.normal(size=(12, 12))
    symmetric = symmetric + symmetric.T

    return (
        _case("generic-6", gram[0], 3, "plain generic"),
        _case("generic-9", gram[1], 5, "plain generic"),
        _case("generic-12", gram[2], 4, "plain generic"),
        _case("generic-14", gram[3], 8, "plain generic"),
        _case("one-channel-kept", gram[0][:1, :1], 0, "plain"),
        _case("one-channel-pruned", gram[0][:1, :1], 1, "plain"),
        _case("prune-none", gram[1], 0, "plain"),
        _case("prune-all", gram[1], 9, "plain"),
        _case("protected", gram[2], 4, "plain generic", some),
        _case("prune-all-that-may-be", gram[2], 8, "plain", some),
        _case("all-protected", gram[1], 0, "plain", np.ones(9, bool)),
        _case("all-alike", np.ones((10, 10)), 4, "plain"),
        _case("identity", np.eye(10), 5, "plain"),
        _case("each-channel-twice", np.kron(gram[0], np.ones((2, 2))), 5, "plain"),
        _case("diagonal", np.diag([5.0, 1, 4, 2, 3, 9, 7, 8]), 3, "plain generic"),
        _case("zero", np.zeros((8, 8)), 3, "plain"),
        _case("rank-one", np.outer(np.abs(signed), np.abs(signed)), 4, "plain"),
        _case("rank-one-signed", np.outer(signed, signed), 4, "plain"),  # its optimum is 0, reached by cancellation
        _case("rank-three", _head(rng, 12, 3, queries=1), 6, "plain generic"),
        _case("block-diagonal", blocks, 6, "plain generic"),
        _case("dead-channels", dead, 5, "plain"),
        _case("tiny", gram[2] * 1e-12, 5, "plain generic"),
        _case("huge", gram[2] * 1e12, 5, "plain generic"),
        _case("mixed-scales", _with_loud_rows(gram[2], 1e2), 6, "plain generic"),
        _case("mixed-scales-loud-rows-pruned", _with_loud_rows(gram[2], 1e2), 10, "plain"),
        _case("badly-mixed-scales", _with_loud_rows(gram[3], 1e4), 7, "plain"),
        _case("ten-decades", _spread(gram[3], 10), 7, "plain decades"),
        _case("separated", near_diagonal, 2, "plain generic separated"),
        _case("separated-protected", near_diagonal, 2, "plain generic separated", np.diagonal(near_diagonal) < 2.5),
        _case("separated-pairs", near_diagonal, 4, "pairs groups separated", groups=np.arange(8) % 4),
        _case("pairs", gram[2], 6, "pairs groups", groups=pairs),
        _case("pairs-protected", gram[2], 4, "pairs groups", np.arange(12) == 8, pairs),
        _case("groups-of-mixed-sizes", gram[2], 6, "groups", groups=mixed_sizes),
        _case("groups-of-mixed-sizes-protected", gram[2], 5, "groups", np.arange(12) == 4, mixed_sizes),
        _case("indefinite", symmetric, 5, "indefinite"),
        _case("negative-definite", -gram[1], 4, "indefinite"),
        # The optimum lies below 0 by 4e-6: a solver that takes W for semidefinite is wrong here.
        _case("slightly-indefinite", np.outer(signed, signed) - 1e-6 * np.eye(8), 4, "indefinite"),
        _case("indefinite-pairs", symmetric, 6, "indefinite groups", groups=pairs),
    )


def _case(
    name: str,
    weights: ArrayLike,
    prune: int,
    tags: str,
    protected: ArrayLike | None = None,
    groups: ArrayLike | None = None,
) -> Case:
    protected = None if protected is None else np.asarray(protected, bool)
    groups = None if groups is None else np.asarray(groups, np.int64)
    problem = SubsetProblem(np.asarray(weights, np.float64), prune, protected, groups, name)
    return Case(name, problem, *brute_force(problem), frozenset(tags.split()))


def _head(rng: np.random.Generator, n: int, keys: int, queries: int = 4) -> FloatArray:
    """W = (Q'Q) o (K'K) of random queries and keys: semidefinite, with entries of both signs."""
    q, k = rng.normal(size=(queries, n)), rng.normal(size=(keys, n))
    weights: FloatArray = (q.T @ q) * (k.T @ k)
    return weights


def _with_loud_rows(weights: FloatArray, factor: float) -> FloatArray:
    """Three channels made ``factor`` times louder, as a few channels of real keys are: W_ii grows by its square."""
    scale = np.ones(len(weights))
    scale[[1, 4, 5]] = factor
    return scale[:, None] * weights * scale


def _spread(weights: FloatArray, decades: float) -> FloatArray:
    """Channels made louder, each by as much as the one before, until the diagonal spans so many decades."""
    scale = 10.0 ** np.linspace(-decades / 4, decades / 4, len(weights))
    return scale[:, None] * weights * scale
