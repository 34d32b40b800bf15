"""Paired statistics: numbers by hand and by scipy, error rates in simulations with fixed seeds."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from coe_megatron.study.report.comparison import Comparison, corrected
from coe_megatron.study.report.statistics import PairedSample, holm

DRAWS = 400
SAMPLES = st.lists(st.floats(-1, 1).map(lambda x: round(x, 4)), min_size=2, max_size=8)


def draws(mean: float, std: float, seeds: int, number: int = DRAWS) -> np.ndarray:
    """Gains [number, seeds]."""
    return np.random.default_rng(1).normal(mean, std, (number, seeds))


def rate(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


def most(probability: float, number: int = DRAWS) -> float:
    """The largest rate that chance gives in 999 of 1,000 simulations."""
    return float(stats.binom.ppf(0.999, number, probability)) / number


def test_three_gains_by_hand() -> None:
    """Mean 0.2, s.d. 0.1, standard error 0.057735, t = 3.4641 with two degrees of freedom; t(0.975, 2) is 4.302653."""
    sample = PairedSample([0.1, 0.2, 0.3])
    assert (sample.mean, sample.std) == (pytest.approx(0.2), pytest.approx(0.1))
    assert sample.p == pytest.approx(0.0741799, abs=1e-6)
    assert sample.interval() == pytest.approx((0.2 - 4.302653 * 0.057735, 0.2 + 4.302653 * 0.057735), abs=1e-5)


@given(SAMPLES, st.floats(-0.5, 0.5))
def test_one_sided_tests_are_scipys(gains: list[float], bound: float) -> None:
    sample = PairedSample(gains)
    if sample.std:
        below, above = (stats.ttest_1samp(gains, bound, alternative=side).pvalue for side in ("less", "greater"))
        assert (sample.p_below(bound), sample.p_above(bound)) == (pytest.approx(below), pytest.approx(above))
        assert sample.p == pytest.approx(stats.ttest_1samp(gains, 0.0).pvalue)


@given(SAMPLES, st.floats(0.01, 1))
def test_equivalence_is_the_90_percent_interval_within_the_margin(gains: list[float], margin: float) -> None:
    sample = PairedSample(gains)
    low, high = sample.interval(0.9) or (0.0, 0.0)
    if min(abs(low + margin), abs(high - margin)) > 1e-9:
        assert ((sample.p_within(margin) or 0.0) < 0.05) == (-margin < low and high < margin)


def test_gains_that_do_not_vary() -> None:
    same, none = PairedSample([0.2] * 3), PairedSample([0.0] * 3)
    assert (same.p, same.interval(), same.is_zero) == (0.0, (0.2, 0.2), False)
    assert (none.p, none.p_within(0.1), none.is_zero) == (1.0, 0.0, True)
    assert same.p_within(0.1) == 1.0 and same.seeds_to_decide(0.1) is None
    one = PairedSample([0.2])
    assert (one.std, one.p, one.p_within(0.1), one.interval(), one.minimum_detectable) == (None,) * 5


def test_the_interval_covers_the_true_gain() -> None:
    covered = [low <= 0.02 <= high for gains in draws(0.02, 0.03, 4) for low, high in [PairedSample(gains).interval()]]
    assert 1 - most(0.05) <= rate(covered) <= 1 - most(0.05) / 4


@pytest.mark.parametrize("side", [1, -1])
def test_equivalence_is_seldom_found_at_the_margin(side: int) -> None:
    found = [PairedSample(gains).p_within(0.03) < 0.05 for gains in draws(side * 0.03, 0.01, 5)]
    assert 0.02 < rate(found) <= most(0.05)
    assert rate([PairedSample(gains).p_within(0.03) < 0.05 for gains in draws(0.0, 0.01, 5)]) > 0.9


def verdicts(gains: np.ndarray, margin: float | None) -> list[str]:
    """Of the arms of one study; gains [arms, seeds]."""
    found = {str(arm): Comparison(dict(enumerate(own)), margin) for arm, own in enumerate(gains)}
    return [each.verdict for each in corrected(found).values()]


def studies(mean: float, std: float, base: float) -> np.ndarray:
    """Gains [study, arm, seed] of six arms with three seeds, which have the baseline's own variation in common."""
    random = np.random.default_rng(2)
    return mean + random.normal(0, std, (DRAWS, 6, 3)) + random.normal(0, base, (DRAWS, 1, 3))


def test_of_arms_without_a_difference_seldom_one_is_better_or_worse() -> None:
    """Without the correction, every fourth study or so would have a false verdict."""
    drawn = studies(0.0, 0.02, 0.02)
    assert rate([bool({"better", "worse"} & set(verdicts(gains, None))) for gains in drawn]) <= most(0.05)
    uncorrected = [any((PairedSample(own).p or 0) < 0.05 for own in gains) for gains in drawn]
    assert rate(uncorrected) > 0.12


def test_of_arms_at_the_margin_seldom_one_is_equivalent() -> None:
    drawn = studies(0.03, 0.02, 0.02)
    assert rate(["equivalent" in verdicts(gains, 0.03) for gains in drawn]) <= most(0.05)


def test_holm_by_hand() -> None:
    """The values of R's p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.7, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_is_between_no_correction_and_bonferronis(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for p, found in zip(p_values, adjusted, strict=True):
        assert p <= found <= min(1.0, len(p_values) * p)
    assert [p for p, _ in sorted(zip(p_values, adjusted, strict=True))] == sorted(p_values)
    assert sorted(adjusted) == [found for _, found in sorted(zip(p_values, adjusted, strict=True))]


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_the_detectable_gain_is_found_in_four_of_five_simulations(seeds: int) -> None:
    gains = draws(0.0, 1.0, seeds)
    detectable = PairedSample((gains[0] - gains[0].mean()) / gains[0].std(ddof=1)).minimum_detectable
    assert detectable is not None
    found = [sample.p < 0.05 and sample.mean > 0 for own in gains for sample in [PairedSample(own + detectable)]]
    assert rate(found) == pytest.approx(0.8, abs=0.06)


def sample_of(mean: float, std: float, seeds: int) -> PairedSample:
    """A sample with exactly this mean and standard deviation."""
    values = np.arange(seeds) - (seeds - 1) / 2
    return PairedSample(list(mean + std * values / values.std(ddof=1)))


@pytest.mark.parametrize(("mean", "margin"), [(0.02, None), (0.005, 0.03), (0.0, 0.03)])
def test_the_seeds_that_would_decide_do_so_in_four_of_five_simulations(mean: float, margin: float | None) -> None:
    """And one seed less does not; the level is that of one of five comparisons."""
    seeds = sample_of(mean, 0.03, 3).seeds_to_decide(margin, tests=5)
    assert seeds is not None and seeds > 3

    def power(number: int) -> float:
        samples = [PairedSample(gains) for gains in draws(mean, 0.03, number, 1000)]
        return rate([5 * min(each.p, 1.0 if margin is None else each.p_within(margin)) < 0.05 for each in samples])

    assert power(seeds) == pytest.approx(0.8, abs=0.06) and power(seeds // 2) < 0.6


def test_the_seeds_that_would_decide_are_unknown_beyond_a_thousand() -> None:
    assert sample_of(1e-4, 0.03, 3).seeds_to_decide(None) is None
    assert sample_of(1e-4, 0.03, 3).seeds_to_decide(0.03) == sample_of(0.0, 0.03, 5).seeds_to_decide(0.03)


def test_verdicts() -> None:
    """A gain that is shown not to be 0, but to be within the margin, is equivalent."""

    def verdict(mean: float, std: float, seeds: int, margin: float | None) -> str:
        return verdicts(np.array([sample_of(mean, std, seeds).differences]), margin)[0]

    assert verdict(0.2, 0.01, 3, None) == verdict(0.2, 0.01, 3, 0.03) == "better"
    assert verdict(-0.2, 0.01, 3, 0.03) == "worse"
    assert (verdict(0.01, 0.001, 3, 0.03), verdict(0.01, 0.001, 3, None)) == ("equivalent", "better")
    assert verdict(0.01, 0.05, 3, 0.03) == verdict(0.0, 0.001, 3, None) == "undecided"
    assert verdict(0.2, 0.001, 2, 0.03) == "" and math.isfinite(sample_of(0.2, 0.1, 3).minimum_detectable or math.nan)
