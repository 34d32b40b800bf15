"""The scaling law recovers what made-up runs were made of, and its intervals hold what they promise."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coe_megatron.errors import ConfigError
from coe_megatron.study.plan import law as law_module
from coe_megatron.study.plan.law import Law, Point, fit_law

TRUE = Law(E=1.8, A=40.0, alpha=0.34, B=60.0, beta=0.3, phi=0.5)
LARGE = Point(0.3e6, 0.5e6, 2, 6e6)  # beyond all runs


def runs(law: Law, noise: float = 0.0, seed: int = 0, iterations: tuple[int, ...] = (1, 2)) -> list[Point]:
    """Three sizes x three numbers of tokens x chains x two seeds, with relative noise of the loss."""
    source = np.random.default_rng(seed)
    found = []
    for size in (1e5, 2e5, 4e5):
        for tokens in (2 * size, 6 * size, 18 * size):
            for c in iterations:
                point = Point(0.3 * size, (0.8 if c == 1 else 0.5) * size, c, tokens)
                found += [replace(point, loss=law.loss(point) * math.exp(source.normal(0, noise))) for _ in range(2)]
    return found


@settings(max_examples=8, deadline=None)
@given(st.floats(1.0, 2.5), st.floats(0.25, 0.6), st.floats(0.25, 0.6), st.floats(-0.3, 1.2), st.floats(0.3, 1.5))
def test_runs_without_noise_give_back_their_law(
    floor: float, alpha: float, beta: float, phi: float, effect: float
) -> None:
    law = Law(floor, effect * 2e5**alpha, alpha, effect * 1e6**beta, beta, phi)
    fit = fit_law(runs(law), replicates=2)
    for name, value in asdict(law).items():
        assert getattr(fit.law, name) == pytest.approx(value, rel=2e-3, abs=2e-3), name
    assert fit.law.loss(LARGE) == pytest.approx(law.loss(LARGE), rel=1e-5)


def test_the_gradient_is_the_slope_of_the_law() -> None:
    data = law_module._Data.of(runs(TRUE))
    solution = np.array([0.5, -0.4, 0.3, -0.7, 0.4, 0.6])
    for column, step in enumerate(np.eye(6) * 1e-6):
        slope = (data.log_loss(solution + step) - data.log_loss(solution - step)) / 2e-6
        assert data.gradient(solution)[:, column] == pytest.approx(slope, abs=1e-8)


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    trials, noise = 40, 0.004
    held = {"prediction": 0, "E": 0, "alpha": 0, "beta": 0, "phi": 0}
    for trial in range(trials):
        fit = fit_law(runs(TRUE, noise, seed=trial), replicates=60, seed=trial)
        low, high = fit.predict(LARGE)[1]
        measured = TRUE.loss(LARGE) * math.exp(np.random.default_rng([trial, 1]).normal(0, noise))
        held["prediction"] += low <= measured <= high
        for name in ("E", "alpha", "beta", "phi"):
            held[name] += fit.intervals[name][0] <= getattr(TRUE, name) <= fit.intervals[name][1]
    # 95 % of 40 is 38; a binomial with that mean is below 34 once in a hundred times
    assert all(count >= 34 for count in held.values()), held


def test_more_noise_gives_wider_intervals() -> None:
    widths = []
    for noise in (0.001, 0.01):
        low, high = fit_law(runs(TRUE, noise), replicates=40).predict(LARGE)[1]
        widths.append(high - low)
    assert widths[1] > 3 * widths[0] > 0


def test_what_the_runs_cannot_tell_is_said() -> None:
    same = fit_law(runs(TRUE, 0.002, iterations=(2,)), replicates=5)
    assert "phi is not identified: all runs have C = 2" in same.warnings and same.law.phi == 0
    together = [point for point in runs(TRUE, 0.002) if point.tokens == 6 * (point.outside * 10 / 3)]
    said = fit_law(together, replicates=5).warnings
    assert any(line.startswith("size and tokens grow together") for line in said)
    assert any(line.startswith("12 runs for 6 parameters") or "poorly identified" in line for line in said)
    assert fit_law(runs(TRUE, 1e-5), replicates=20).warnings == []


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([], "the ladder has 0 finished runs: its law needs at least 6"),
        (runs(TRUE)[:6], "the ladder has 6 finished runs: its law needs at least 7"),
        (
            [replace(point, outside=1e5, inside=1e5) for point in runs(TRUE)],
            "have one size: its law needs at least two",
        ),
        ([replace(point, tokens=1e6) for point in runs(TRUE)], "have one number of tokens: its law needs at least two"),
    ],
)
def test_too_few_runs_are_refused_in_one_line(points: list[Point], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        fit_law(points)
    assert said in str(error.value) and "\n" not in str(error.value)
