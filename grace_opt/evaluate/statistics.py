"""Intervals and tests over documents: how far a mean would move on other documents of the same kind.

A document is one observation, whatever its number of scored tokens: tokens of one text depend on each other, so
intervals over tokens would be far too narrow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from grace_opt.errors import InputError


@dataclass(frozen=True)
class Interval:
    """A mean over documents and its confidence interval; ``low`` and ``high`` are None with one document."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Paired:
    """The mean of a - b over the same documents with its interval, and the p-value of "a and b are alike"."""

    difference: Interval
    p_value: float


def bootstrap_mean(values: ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """The mean of one value a document, float64[d], and its interval from resampling the documents.

    Bias-corrected and accelerated bootstrap (Efron 1987, scipy.stats.bootstrap), which allows for the skew of KL, at a
    level raised by as much as Student's t is wider than the normal distribution (Hesterberg 2015, "expanded"), because
    resampling few documents spreads too little.
    Equal values give an interval of width 0. The same seed gives the same interval.
    O(resamples d). Raises InputError if there is no value, or one that is not finite.
    """
    array = _checked(values)
    mean = float(array.mean())
    if len(array) == 1:
        return Interval(mean, None, None)
    if np.ptp(array) <= 1e-12 * np.abs(array).max():  # equal but for rounding: BCa would divide by the spread
        return Interval(mean, mean, mean)
    from scipy.stats import bootstrap, norm, t

    d, scale = len(array), float(np.exp2(np.frexp(np.abs(array).max())[1] - 1))  # cubes of tiny values would vanish
    tail = norm.cdf(-np.sqrt(d / (d - 1)) * t.ppf((1 + confidence) / 2, d - 1))
    interval = bootstrap(
        (array / scale,),
        np.mean,
        confidence_level=min(1 - 2 * tail, 1 - 1e-12),
        n_resamples=resamples,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, scale * float(interval.low), scale * float(interval.high))


def paired(a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Paired:
    """Whether two policies differ on the same documents: ``a`` and ``b`` hold one value each a document, float64[d].

    The interval is that of `bootstrap_mean` for a - b. The two-sided p-value is that of the paired permutation test on
    the mean (scipy.stats.permutation_test): if a and b were alike, each document's difference could as well have the
    other sign. It is exact for up to 13 documents (2^d at most ``resamples``) and otherwise from random signs. It
    cannot be below 2^(1-d), which is 1 for one document and .031 for six, nor below 2 / ``resamples``. Raises
    InputError as `bootstrap_mean` does, or if the lengths differ.
    """
    first, second = _checked(a), _checked(b)
    if len(first) != len(second):
        raise InputError(f"{len(first)} and {len(second)} values are no pairs; evaluate both on the same documents")
    difference = first - second
    interval = bootstrap_mean(difference, confidence=confidence, resamples=resamples, seed=seed)
    if len(difference) == 1:
        return Paired(interval, 1.0)
    from scipy.stats import permutation_test

    test = permutation_test(
        (difference,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        rng=np.random.default_rng(seed),
    )
    return Paired(interval, float(test.pvalue))


def rate(found: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """The share of needles found, bool[d], one a prompt, with Wilson's interval (1927; scipy.stats.binomtest).

    A bootstrap of needles that were all found would have no width; 18 of 18 say no more than "above .82".
    Raises InputError if there is no value.
    """
    array = _checked(found)
    from scipy.stats import binomtest

    test = binomtest(int(array.sum()), len(array))
    interval = test.proportion_ci(confidence, method="wilson")
    return Interval(float(array.mean()), float(interval.low), float(interval.high))


def _checked(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size == 0:
        raise InputError(f"expected one value a document, got an array of shape {array.shape}")
    if not np.isfinite(array).all():
        raise InputError(f"the value of document {int(np.argmin(np.isfinite(array)))} is not finite; leave it out")
    return array
