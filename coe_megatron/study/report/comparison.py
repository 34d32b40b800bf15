"""Compare arms with the baseline of their stratum: paired by seed, corrected for the number of comparisons."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import mean, stdev

from coe_megatron.study.plan.cost_table import ArmPlan
from coe_megatron.study.report.results import Result, finished_results
from coe_megatron.study.report.statistics import LEVEL, MIN_SEEDS, PairedSample, holm

VERDICTS = ("better", "worse", "equivalent", "undecided")


@dataclass(frozen=True)
class Comparison:
    """The gains of one arm over its baseline.

    Attributes:
        gains: by seed that both have finished; positive is better.
        margin: gains between -margin and margin count as equal; None if the study declares no margin.
        p_adjusted: p-value of the two-sided test against no gain, by Holm's correction over `tests`.
        equivalence_p: p-value of two one-sided tests of equivalence, by Holm's correction over `tests`; None without a
            margin.
        tests: number of comparisons with a verdict; 0 with fewer than three common seeds.
    """

    gains: Mapping[int, float]
    margin: float | None = None
    p_adjusted: float | None = None
    equivalence_p: float | None = None
    tests: int = 0

    @cached_property
    def sample(self) -> PairedSample:
        """The gains as a sample, with its tests."""
        return PairedSample(list(self.gains.values()))

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`; empty with fewer than three common seeds.

        `equivalent` if the gain is shown to be within the margin, even if it is not 0, or is 0 for every seed;
        `better` or `worse` if it is shown not to be 0. Both are at the level of 0.05 after correction; the interval of
        `sample` is not corrected.
        """
        if self.p_adjusted is None:
            return ""
        if self.sample.is_zero or (self.equivalence_p is not None and self.equivalence_p < LEVEL):
            return "equivalent"
        if self.p_adjusted < LEVEL:
            return "better" if self.sample.mean > 0 else "worse"
        return "undecided"

    @property
    def seeds_to_decide(self) -> int | None:
        """How many seeds would probably decide (`PairedSample.seeds_to_decide`)."""
        return self.sample.seeds_to_decide(self.margin, max(1, self.tests))


@dataclass(frozen=True)
class Summary:
    """Statistics of one arm over its finished seeds.

    Attributes:
        losses: final validation loss by seed, in nats per token.
        comparison: with the baseline of its stratum, whose loss minus this arm's is the gain; None for a baseline, and
            without a common seed.
    """

    arm: ArmPlan
    losses: Mapping[int, float]
    comparison: Comparison | None = None

    @property
    def is_baseline(self) -> bool:
        """Whether it is the baseline of a stratum."""
        return self.arm.arm.baseline == self.arm.arm.name

    @property
    def mean(self) -> float | None:
        """Mean of the losses."""
        return mean(self.losses.values()) if self.losses else None

    @property
    def std(self) -> float | None:
        """Standard deviation of the losses over seeds; None with fewer than two seeds."""
        return stdev(self.losses.values()) if len(self.losses) > 1 else None

    @property
    def gains(self) -> Mapping[int, float]:
        """The gains by seed."""
        return self.comparison.gains if self.comparison else {}

    @property
    def gain(self) -> float | None:
        """Mean of the gains; None without any."""
        return self.comparison.sample.mean if self.comparison else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the gain, not corrected; None with fewer than two common seeds."""
        return self.comparison.sample.interval() if self.comparison else None

    @property
    def verdict(self) -> str:
        """`Comparison.verdict`; empty without a comparison."""
        return self.comparison.verdict if self.comparison else ""


def compare(results: Sequence[Result], arms: Sequence[ArmPlan], margin: float | None = None) -> list[Summary]:
    """Summarize every arm, in order; losses are paired by seed, so that the effect of a seed cancels.

    Args:
        margin: of equivalence, in nats per token; None for no equivalence verdict.
    """
    losses = by_seed(results, lambda result: result.loss)
    comparisons = compare_values(losses, arms, -1, margin)
    return [Summary(arm, losses.get(arm.arm.name, {}), comparisons.get(arm.arm.name)) for arm in arms]


def by_seed(results: Sequence[Result], value: Callable[[Result], float | None]) -> dict[str, dict[int, float]]:
    """A value of every finished run that has it, by arm and seed."""
    found: dict[str, dict[int, float]] = {}
    for result in finished_results(results):
        if (own := value(result)) is not None:
            found.setdefault(result.run.arm, {})[result.run.seed] = own
    return found


def compare_values(
    values: Mapping[str, Mapping[int, float]], arms: Sequence[ArmPlan], sign: int, margin: float | None = None
) -> dict[str, Comparison]:
    """Compare a quantity of the arms with that of their baselines, as one family of tests.

    Args:
        values: by arm and seed.
        sign: 1 if a larger value is better, otherwise -1.
    """
    found = {}
    for arm in (plan.arm for plan in arms):
        own, base = values.get(arm.name, {}), values.get(arm.baseline, {})
        common = sorted(own.keys() & base.keys())
        if arm.baseline != arm.name and common:
            found[arm.name] = Comparison({seed: sign * (own[seed] - base[seed]) for seed in common}, margin)
    return corrected(found)


def corrected(comparisons: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """The comparisons with adjusted p-values; those with fewer than three common seeds are not tested.

    Holm's correction is over the tests of a difference, and over the tests of equivalence, each as a family.
    """
    tested = {name: each for name, each in comparisons.items() if len(each.gains) >= MIN_SEEDS}
    different = _adjusted({name: each.sample.p for name, each in tested.items()})
    within = {name: each.sample.p_within(each.margin) for name, each in tested.items() if each.margin is not None}
    equivalent = _adjusted(within)
    return {
        name: replace(each, p_adjusted=different.get(name), equivalence_p=equivalent.get(name), tests=len(different))
        for name, each in comparisons.items()
    }


def _adjusted(p_values: Mapping[str, float | None]) -> dict[str, float]:
    known = {name: p for name, p in p_values.items() if p is not None}
    return dict(zip(known, holm(list(known.values())), strict=True))
