"""Effective speed-up: what the baseline needs to reach an arm's final loss, over what the arm needed.

Curves are interpolated for each seed, linearly in the logarithm of the amount, and not extrapolated: if the baseline
has not reached the loss by its last evaluation, the speed-up is only known to be larger than what that would give.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

from coe_megatron.study.report.results import Result
from coe_megatron.study.report.statistics import PairedSample

Points: TypeAlias = Sequence[tuple[float, float]]  # amount > 0 and loss, by rising amount
Bound: TypeAlias = Literal["", "<", ">"]

QUANTITIES: Mapping[str, Callable[[Result], float]] = {
    "steps": lambda result: result.run.config.training.steps,
    "tokens": lambda result: result.steps[-1]["tokens"],
    "FLOPs": lambda result: result.arm.flops,
    "seconds": lambda result: result.seconds,
}


@dataclass(frozen=True)
class Reached:
    """Where a curve first reaches a loss.

    Attributes:
        bound: `<` if the first point is below the loss already; `>` if no point is; then `amount` is that of the first
            or last point.
    """

    amount: float
    bound: Bound = ""


@dataclass(frozen=True)
class Factor:
    """A ratio over seeds.

    Attributes:
        sample: logarithms of the ratios, or of the bounds where only these are known.
        bound: what the geometric mean is: exact, or an upper (`<`) or lower (`>`) bound.
    """

    sample: PairedSample
    bound: Bound

    @property
    def mean(self) -> float:
        """Geometric mean of the ratios, or its bound."""
        return math.exp(self.sample.mean)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the geometric mean, by Student's t of the logarithms; None of a bound, or with
        fewer than two seeds.
        """
        ends = None if self.bound else self.sample.interval()
        return None if ends is None else (_exp(ends[0]), _exp(ends[1]))


def reached(points: Points, loss: float) -> Reached:
    """Where a curve first reaches a loss; at least one point."""
    if points[0][1] <= loss:
        return Reached(points[0][0], "<" if points[0][1] < loss else "")
    for (before, above), (after, below) in pairwise(points):
        if below <= loss:
            share = (above - loss) / (above - below)
            return Reached(before * (after / before) ** share)
    return Reached(points[-1][0], ">")


def factor(ratios: Sequence[Reached]) -> Factor | None:
    """The geometric mean of ratios over seeds; None if some are bounded from above and others from below."""
    bounds = {ratio.bound for ratio in ratios} - {""}
    if len(bounds) > 1 or not all(ratio.amount > 0 for ratio in ratios):
        return None
    return Factor(PairedSample([math.log(ratio.amount) for ratio in ratios]), bounds.pop() if bounds else "")


def speedups(own: Mapping[int, Result], baseline: Mapping[int, Result]) -> dict[str, Factor | None]:
    """The speed-up of an arm in each of `QUANTITIES`; empty without a common seed.

    Within a run, all quantities are taken as proportional to its steps.

    Args:
        own: finished runs of the arm by seed.
        baseline: those of its baseline.
    """
    if not (common := sorted(own.keys() & baseline.keys())):
        return {}
    places = {seed: reached(learning_curve(baseline[seed]), own[seed].loss) for seed in common}

    def ratio(seed: int, amount: Callable[[Result], float]) -> Reached:
        share = places[seed].amount / baseline[seed].run.config.training.steps
        needed = amount(own[seed])
        return Reached(share * amount(baseline[seed]) / needed if needed else 0.0, places[seed].bound)

    return {name: factor([ratio(seed, amount) for seed in common]) for name, amount in QUANTITIES.items()}


def learning_curve(result: Result) -> Points:
    """Steps and validation losses of a finished run, after the first step."""
    return [(line["step"], line["valid_loss"]) for line in result.evaluations if line["step"]]


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
