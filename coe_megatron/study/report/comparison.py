"""Arms against the baseline: mean, spread over seeds, and a paired test."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy import stats

from coe_megatron.study.plan.cost_table import ArmPlan
from coe_megatron.study.report.results import Result, done

_CONFIDENCE = 0.95
_ROUNDING = 1e-9  # of losses in float64


@dataclass(frozen=True)
class Summary:
    """One arm over its finished seeds.

    Attributes:
        losses: the validation loss after the last step by seed, in nats per counted token.
        gain: of the mean over seeds: the baseline's loss less this arm's, seed by seed; positive is better. None of the
            baseline itself, and without a common seed.
        interval: of 95 % confidence for that gain, by Student's t over the seeds; None with fewer than two. A point
            where every seed gains the same.
        p: of a paired t-test (two-sided) that there is no gain; None with fewer than two seeds, or no spread.
        seeds: in common with the baseline.
    """

    arm: ArmPlan
    losses: dict[int, float]
    seeds: int = 0
    gain: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None

    @property
    def mean(self) -> float | None:
        """Of the losses."""
        return mean(self.losses.values()) if self.losses else None

    @property
    def spread(self) -> float | None:
        """Standard deviation of the losses over seeds; None of fewer than two."""
        return stdev(self.losses.values()) if len(self.losses) > 1 else None

    @property
    def verdict(self) -> str:
        """`better` or `worse` where the interval leaves out 0, else `no difference seen`; empty where there is none."""
        if self.interval is None:
            return ""
        low, high = self.interval
        return "better" if low > 0 else "worse" if high < 0 else "no difference seen"


def compare(results: Sequence[Result], arms: Sequence[ArmPlan], baseline: str) -> list[Summary]:
    """A summary of every arm, in their order; seeds are paired, so that what a seed alone does cancels."""
    losses: dict[str, dict[int, float]] = {arm.arm.name: {} for arm in arms}
    for result in done(results):
        losses[result.run.arm][result.run.seed] = result.loss
    return [_summary(arm, losses[arm.arm.name], losses[baseline], arm.arm.name == baseline) for arm in arms]


def _summary(arm: ArmPlan, losses: dict[int, float], baseline: dict[int, float], is_baseline: bool) -> Summary:
    common = sorted(losses.keys() & baseline.keys())
    if is_baseline or not common:
        return Summary(arm, losses)
    gains = [baseline[seed] - losses[seed] for seed in common]
    if len(gains) < 2:
        return Summary(arm, losses, len(gains), mean(gains))
    if max(gains) - min(gains) < _ROUNDING:  # such as all 0, by a setting without effect; nothing is there to test
        return Summary(arm, losses, len(gains), gains[0], (gains[0], gains[0]))
    tested = stats.ttest_1samp(gains, 0.0)
    low, high = tested.confidence_interval(_CONFIDENCE)
    return Summary(arm, losses, len(gains), mean(gains), (float(low), float(high)), float(tested.pvalue))
