"""The study's statistics against scipy's, on simulated data whose truth is known, and as properties."""

from __future__ import annotations

import time

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.core.errors import ThriftyError
from thrifty.study.statistics import Interval, bootstrap, mean, paired_bootstrap, score, standard_error

finite = st.floats(-1e6, 1e6, allow_nan=False)
row = st.tuples(st.floats(0, 100), st.floats(0.5, 100)).map(list)


@st.composite
def two_methods(draw: st.DrawFn) -> tuple[list[list[list[float]]], list[list[list[float]]]]:
    seeds, rows = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    method = st.lists(st.lists(row, min_size=rows, max_size=rows), min_size=seeds, max_size=seeds)
    return draw(method), draw(method)


def _ratio_rows(source: np.random.Generator, rows: int) -> list[list[float]]:
    below = source.integers(1, 30, size=rows)
    return [[float(source.gamma(2.0) * d), float(d)] for d in below]


@given(st.lists(finite, min_size=2, max_size=8))
def test_mean_and_standard_error_are_scipys(values: list[float]) -> None:
    assert mean(values) == pytest.approx(np.mean(values), rel=1e-9, abs=1e-6)
    assert standard_error(values) == pytest.approx(scipy.stats.sem(values), rel=1e-9, abs=1e-9)


def test_one_seed_has_no_standard_error() -> None:
    assert standard_error([0.3]) is None


def test_equal_denominators_agree_with_scipy() -> None:
    source = np.random.default_rng(3)
    a = source.random(150)
    b = 0.6 * a + 0.3 * source.random(150)
    theirs = scipy.stats.bootstrap(
        (a, b),
        lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
        paired=True, vectorized=True, n_resamples=10_000, method="percentile", rng=1,
    )  # fmt: skip
    ours = paired_bootstrap([[[x, 1] for x in a]], [[[x, 1] for x in b]])
    assert ours.difference == pytest.approx(a.mean() - b.mean(), abs=1e-12)
    _close(ours, theirs.confidence_interval)


def test_ratios_agree_with_scipy() -> None:
    source = np.random.default_rng(4)
    a, b = np.array(_ratio_rows(source, 120)), np.array(_ratio_rows(source, 120))
    theirs = scipy.stats.bootstrap(
        (a[:, 0], a[:, 1], b[:, 0], b[:, 1]),
        lambda p, q, r, s, axis: p.sum(axis=axis) / q.sum(axis=axis) - r.sum(axis=axis) / s.sum(axis=axis),
        paired=True, vectorized=True, n_resamples=10_000, method="percentile", confidence_level=0.9, rng=1,
    )  # fmt: skip
    ours = paired_bootstrap([a.tolist()], [b.tolist()], confidence=0.9)
    assert ours.difference == pytest.approx(a[:, 0].sum() / a[:, 1].sum() - b[:, 0].sum() / b[:, 1].sum())
    _close(ours, theirs.confidence_interval)


def test_one_methods_own_interval_and_error_agree_with_scipy() -> None:
    a = np.array(_ratio_rows(np.random.default_rng(5), 100))
    theirs = scipy.stats.bootstrap(
        (a[:, 0], a[:, 1]),
        lambda p, q, axis: p.sum(axis=axis) / q.sum(axis=axis),
        paired=True, vectorized=True, n_resamples=10_000, method="percentile", rng=1,
    )  # fmt: skip
    ours = bootstrap([a.tolist()])
    _close(Interval(ours.score, ours.low, ours.high), theirs.confidence_interval)
    assert ours.score == pytest.approx(score(a.tolist()), rel=1e-12)
    assert ours.error == pytest.approx(theirs.standard_error, rel=0.05)


def _close(ours: Interval, theirs: tuple[float, float]) -> None:
    width = theirs[1] - theirs[0]  # an end of 10,000 draws is known to about 0.7 % of the width
    assert (ours.low, ours.high) == (
        pytest.approx(theirs[0], abs=0.04 * width),
        pytest.approx(theirs[1], abs=0.04 * width),
    )


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Rows are hard or easy for all, seeds good or bad. Of six seeds' variance 5/6 is seen."""
    source, hits, trials, truth = np.random.default_rng(6), 0, 200, 0.3
    for trial in range(trials):
        hard = source.normal(size=80)
        a, b = (
            hard + shift + source.normal(scale=0.3, size=(6, 1)) + source.normal(size=(6, 80)) for shift in (truth, 0.0)
        )
        found = paired_bootstrap(_rows(a), _rows(b), resamples=400, seed=trial)
        hits += found.low <= truth <= found.high
    assert 0.87 <= hits / trials <= 0.99


def test_pairing_removes_what_rows_have_in_common() -> None:
    source = np.random.default_rng(7)
    hard = source.normal(scale=5.0, size=200)
    a, b = hard + 0.5 + source.normal(scale=0.1, size=(2, 200)), hard + source.normal(scale=0.1, size=(2, 200))
    paired, alone = paired_bootstrap(_rows(a), _rows(b)), bootstrap(_rows(a))
    assert paired.low > 0.4
    assert paired.high - paired.low < 0.1 * (alone.high - alone.low)


def test_seeds_that_disagree_widen_the_interval() -> None:
    rows = np.random.default_rng(8).normal(size=60)
    same, apart = _rows(np.stack([rows, rows])), _rows(np.stack([rows - 1, rows + 1]))
    narrow, wide = bootstrap(same), bootstrap(apart)
    assert narrow.score == pytest.approx(wide.score)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def _rows(values: np.ndarray) -> list[list[list[float]]]:
    return [[[float(x), 1.0] for x in seed] for seed in values]


@settings(max_examples=50)
@given(two_methods())
def test_a_method_differs_from_itself_by_exactly_nothing(pair: tuple) -> None:
    assert paired_bootstrap(pair[0], pair[0], resamples=200) == Interval(0.0, 0.0, 0.0)


@settings(max_examples=50)
@given(two_methods())
def test_swapping_the_methods_turns_the_interval_around(pair: tuple) -> None:
    there, back = (paired_bootstrap(x, y, resamples=200) for x, y in (pair, pair[::-1]))
    close = {"rel": 1e-9, "abs": 1e-9}
    assert there.difference == pytest.approx(-back.difference, **close)
    assert there.low == pytest.approx(-back.high, **close)
    assert there.high == pytest.approx(-back.low, **close)
    assert there.low <= there.high


def test_resamples_without_any_denominator_are_left_out() -> None:
    rows = [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]  # F1 of rows where nothing was to be found: 8 of 27 draws are 0 / 0
    assert bootstrap([rows]).low == bootstrap([rows]).high == 1.0
    assert np.isnan(score(rows[1:]))
    assert np.isnan(bootstrap([rows[1:]]).low)


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        ([[[1, 1]]], [[[1, 1]], [[1, 1]]], "same seeds and rows"),
        ([[[1, 1], [0, 1]]], [[[1, 1]]], "same seeds and rows"),
        ([[[1, 1]], [[1, 1], [0, 1]]], [[[1, 1]], [[1, 1]]], "every seed needs the same rows"),
        ([], [], "no seeds"),
    ],
)
def test_what_cannot_be_paired_is_refused(a: list, b: list, says: str) -> None:
    with pytest.raises(ThriftyError, match=says):
        paired_bootstrap(a, b)


def test_many_rows_are_drawn_in_parts() -> None:
    rows = _rows(np.random.default_rng(9).normal(size=(1, 3000)))
    before = time.perf_counter()
    found = bootstrap(rows, resamples=4000)  # 12 million weights
    assert found.error == pytest.approx(1 / np.sqrt(3000), rel=0.1)
    assert time.perf_counter() - before < 20
