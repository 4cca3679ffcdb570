"""hypothesis strategies for problems."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from grace_opt.problem import FloatArray, SubsetProblem


def gram_weights(rng: np.random.Generator, n: int, rank: int, definite: bool) -> FloatArray:
    """W of a random head: a Hadamard product of two Gram matrices, or any symmetric matrix."""
    if not definite:
        a = rng.normal(size=(n, n))
        return a + a.T
    q, k = rng.normal(size=(rank, n)), rng.normal(size=(rank + 2, n)) * rng.lognormal(sigma=1.0, size=n)
    return (q.T @ q) * (k.T @ k)


@st.composite
def problems(draw: st.DrawFn, largest: int = 10, groups: bool = True, definite: bool | None = None) -> SubsetProblem:
    """Small problems of every shape: protected channels, tied groups of one size, all scales."""
    n = draw(st.integers(1, largest))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    psd = draw(st.booleans()) if definite is None else definite
    scale = 10.0 ** draw(st.integers(-12, 12))
    weights = scale * gram_weights(rng, n, draw(st.integers(1, 12)), psd)
    protected = rng.random(n) < draw(st.sampled_from([0.0, 0.2, 1.0]))
    tied = None
    if groups and n % 2 == 0 and draw(st.booleans()):
        tied = np.arange(n) % (n // 2)  # RoPE pairs of the half-split layout
        protected = protected & protected[(np.arange(n) + n // 2) % n]
    step = 1 if tied is None else 2
    free = int((~protected).sum())
    return SubsetProblem(weights, step * draw(st.integers(0, free // step)), protected, tied)
