"""Paired statistics over seeds: intervals, tests, equivalence, Holm's correction, power.

Differences are one per seed, and assumed to be normal. Equivalence is tested by two one-sided tests (Schuirmann 1987,
J. Pharmacokinet. Biopharm. 15): that the mean is above -margin, and that it is below margin. Power is that of a
noncentral Student's t.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, stdev

import numpy as np
from scipy import optimize, stats

LEVEL = 0.05  # of tests; intervals have confidence 1 - LEVEL
MIN_SEEDS = 3  # below, a verdict would rest on one degree of freedom
MAX_SEEDS = 1000  # that `seeds_to_decide` considers
_POWER = 0.8
_ROUNDING = 1e-9  # of losses in float64
_LARGEST_EFFECT = 40.0  # in standard errors; found with a power of 0.8 even with 3 seeds


@dataclass(frozen=True)
class PairedSample:
    """Differences of paired values, one per seed; at least one."""

    differences: Sequence[float]

    @cached_property
    def mean(self) -> float:
        """Mean difference."""
        return mean(self.differences)

    @cached_property
    def std(self) -> float | None:
        """Standard deviation of the differences; None with one. 0 if they differ by rounding only."""
        if len(self.differences) < 2:
            return None
        return stdev(self.differences) if np.ptp(self.differences) > _ROUNDING else 0.0

    @property
    def is_zero(self) -> bool:
        """Whether all differences are 0, such as of a setting without effect."""
        return self.std == 0.0 and abs(self.mean) <= _ROUNDING

    def interval(self, confidence: float = 1 - LEVEL) -> tuple[float, float] | None:
        """Confidence interval of the mean; None with one difference, a point without variance."""
        if self.std is None:
            return None
        reach = self._error * float(stats.t.ppf((1 + confidence) / 2, self._freedom))
        return self.mean - reach, self.mean + reach

    def p_below(self, bound: float) -> float | None:
        """p-value of the one-sided test that the true mean is below a bound; None with one difference.

        Without variance it is 0 if the mean is below the bound by more than rounding, otherwise 1.
        """
        if self.std is None:
            return None
        if not self.std:
            return float(self.mean >= bound - _ROUNDING)
        return float(stats.t.cdf((self.mean - bound) / self._error, self._freedom))

    def p_above(self, bound: float) -> float | None:
        """As `p_below`, that it is above the bound."""
        return PairedSample([-value for value in self.differences]).p_below(-bound)

    @property
    def p(self) -> float | None:
        """p-value of the two-sided test against a mean of 0; None with one difference."""
        below, above = self.p_below(0.0), self.p_above(0.0)
        return None if below is None or above is None else min(1.0, 2 * min(below, above))

    def p_within(self, margin: float) -> float | None:
        """p-value of equivalence: the larger one of the tests that the mean is above -margin, and below margin."""
        below, above = self.p_below(margin), self.p_above(-margin)
        return None if below is None or above is None else max(below, above)

    @property
    def minimum_detectable(self) -> float | None:
        """The true mean that a two-sided test at `LEVEL` finds with a power of 0.8, with as many differences and the
        same standard deviation; None with fewer than three.
        """
        if self.std is None or len(self.differences) < MIN_SEEDS:
            return None
        critical = stats.t.ppf(1 - LEVEL / 2, self._freedom)
        effect = optimize.brentq(
            lambda effect: stats.nct.sf(critical, self._freedom, effect) - _POWER, 0.0, _LARGEST_EFFECT
        )
        return float(effect) * self._error

    def seeds_to_decide(self, margin: float | None, tests: int = 1) -> int | None:
        """The number of seeds with which the test against 0, or that of equivalence, would succeed (`seeds_for`).

        Args:
            margin: of equivalence; None for the test against 0 only.
            tests: number of tests in the family, by which their level is divided: the strictest step of Holm's method.
        """
        found = [self.seeds_for([abs(self.mean)], LEVEL / tests / 2)]
        if margin is not None:
            found.append(self.seeds_for([margin - self.mean, margin + self.mean], LEVEL / tests))
        return min(filter(None, found), default=None)

    def seeds_for(self, distances: Sequence[float], level: float) -> int | None:
        """The number of seeds with which one-sided tests would all succeed with a power of 0.8, if the true mean and
        standard deviation are the measured ones; None if it is more than `MAX_SEEDS`, or not known.

        Args:
            distances: of the mean from the bounds of the tests, positive on the side that is tested for.
            level: of each test.
        """
        if not self.std or min(distances) <= 0:
            return None
        seeds = np.arange(MIN_SEEDS, MAX_SEEDS + 1)
        errors, critical = self.std / np.sqrt(seeds), stats.t.ppf(1 - level, seeds - 1)
        powers = [stats.nct.sf(critical, seeds - 1, distance / errors) for distance in distances]
        enough = seeds[np.sum(powers, axis=0) - (len(powers) - 1) >= _POWER]  # P(A and B) >= P(A) + P(B) - 1
        return int(enough[0]) if len(enough) else None

    @property
    def _freedom(self) -> int:
        return len(self.differences) - 1

    @property
    def _error(self) -> float:
        """Standard error of the mean."""
        return (self.std or 0.0) / math.sqrt(len(self.differences))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Holm 1979, Scand. J. Statist. 6): the probability of any false rejection among those at
    most LEVEL is at most LEVEL, however the tests depend on each other.
    """
    order, adjusted, largest = sorted(range(len(p_values)), key=lambda i: p_values[i]), [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
