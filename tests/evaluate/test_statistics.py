"""Intervals and paired tests over documents, against enumeration and simulation."""

from __future__ import annotations

import warnings
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from grace_opt.errors import InputError
from grace_opt.evaluate.statistics import Interval, Paired, bootstrap_mean, paired, rate

VALUES = st.lists(st.floats(0, 10, allow_subnormal=False), min_size=2, max_size=8)


@given(VALUES)
@example([0.0, 4.09992781e-250])
def test_the_interval_lies_around_the_mean_and_within_the_values(values: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interval = bootstrap_mean(values, resamples=200)
    assert interval.mean == pytest.approx(np.mean(values))
    assert interval.low is not None
    assert interval.high is not None
    slack = 1e-9 * max(values)
    assert min(values) - slack <= interval.low <= interval.high + slack
    assert interval.high <= max(values) + slack


def test_one_document_has_no_interval() -> None:
    assert bootstrap_mean([0.25]) == Interval(0.25, None, None)
    assert paired([0.5], [0.25]) == Paired(Interval(0.25, None, None), 1.0)


@pytest.mark.parametrize("values", [[0.1, 0.1, 0.1], [0.1, 0.1 * (1 + 1e-15), 0.1], [0.0, 0.0]])
def test_equal_values_have_an_interval_of_no_width(values: list[float]) -> None:
    interval = bootstrap_mean(values)
    assert interval.low == interval.high == interval.mean == pytest.approx(values[0])


def test_the_interval_scales_narrows_and_repeats() -> None:
    values = np.random.default_rng(0).exponential(size=40)
    few, many = bootstrap_mean(values[:10]), bootstrap_mean(values)
    assert bootstrap_mean(values) == many
    assert bootstrap_mean(values, seed=1) != many
    wide = bootstrap_mean(values, confidence=0.99)
    assert few.low is not None
    assert few.high is not None
    assert many.low is not None
    assert many.high is not None
    assert wide.low is not None
    assert wide.high is not None
    assert many.high - many.low < few.high - few.low
    assert wide.low < many.low < many.high < wide.high
    scaled = bootstrap_mean(1000 * values)
    assert scaled.low == pytest.approx(1000 * many.low)
    assert scaled.high == pytest.approx(1000 * many.high)


def test_the_interval_holds_the_true_mean_about_as_often_as_it_says() -> None:
    samples = np.random.default_rng(0).standard_normal((300, 12))
    held = 0
    for sample in samples:
        interval = bootstrap_mean(sample, resamples=1000)
        assert interval.low is not None
        assert interval.high is not None
        held += interval.low <= 0 <= interval.high
    assert 0.91 <= held / len(samples) <= 0.98


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=8))
def test_the_p_value_of_few_documents_is_exact(differences: list[int]) -> None:
    d = np.array(differences, float)
    means = np.array([np.mean(d * signs) for signs in product([-1, 1], repeat=len(d))])
    # Two-sided as twice the smaller tail; the distribution is symmetric, so that is the tail of |mean|.
    expected = min(1.0, 2 * np.mean(means >= abs(d.mean()) - 1e-12))
    assert paired(d, np.zeros(len(d))).p_value == pytest.approx(expected)


def test_six_documents_that_agree() -> None:
    a = np.array([0.1, 0.3, 0.2, 0.4, 0.1, 0.2])
    result = paired(a, a / 4)
    assert result.p_value == pytest.approx(2 / 2**6)
    assert result.difference.mean == pytest.approx(0.75 * a.mean())
    assert result.difference.low is not None
    assert result.difference.low > 0
    assert paired(a / 4, a).p_value == result.p_value


def test_many_documents_are_sampled_and_repeat() -> None:
    rng = np.random.default_rng(0)
    a = rng.exponential(size=60)
    alike = a + rng.normal(scale=0.5, size=60)
    assert paired(a, a + 1).p_value < 0.001
    assert paired(a, alike, seed=3) == paired(a, alike, seed=3)
    assert paired(a, alike).p_value > 0.01


def test_the_rate_of_needles_is_uncertain_even_if_all_are_found() -> None:
    every = rate([True] * 18)
    assert every.mean == every.high == 1
    assert every.low == pytest.approx(18 / (18 + 1.96**2), abs=1e-3)  # Wilson's formula for d of d
    some = rate([True, False, True, True])
    assert some.mean == 0.75
    assert (some.low, some.high) == pytest.approx((0.3006, 0.9544), abs=1e-4)
    with pytest.raises(InputError, match="one value a document"):
        rate([])


def test_bad_input_is_a_sentence() -> None:
    with pytest.raises(InputError, match="document 1 is not finite"):
        bootstrap_mean([1.0, np.nan])
    with pytest.raises(InputError, match="one value a document"):
        bootstrap_mean([])
    with pytest.raises(InputError, match="one value a document"):
        bootstrap_mean([[1.0], [2.0]])
    with pytest.raises(InputError, match="2 and 3 values are no pairs"):
        paired([1, 2], [1, 2, 3])
