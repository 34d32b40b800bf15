"""Compare arms with the baseline: mean, standard deviation over seeds, and a paired t-test."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy import stats

from coe_megatron.study.plan.cost_table import ArmPlan
from coe_megatron.study.report.results import Result, finished_results

_CONFIDENCE = 0.95
_ROUNDING = 1e-9  # of losses in float64


@dataclass(frozen=True)
class Summary:
    """Statistics of one arm over its finished seeds.

    Attributes:
        losses: final validation loss by seed, in nats per token.
        gain: mean over seeds of the baseline's loss minus this arm's; positive is better. None for the baseline itself,
            and without a common seed.
        interval: 95 % confidence interval of the gain, by Student's t over seeds; None with fewer than two seeds. A
            point if the gain is the same for every seed.
        p: p-value of a two-sided paired t-test against no gain; None with fewer than two seeds, or without variance.
        seeds: number of seeds in common with the baseline.
    """

    arm: ArmPlan
    losses: dict[int, float]
    seeds: int = 0
    gain: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None

    @property
    def mean(self) -> float | None:
        """Mean of the losses."""
        return mean(self.losses.values()) if self.losses else None

    @property
    def std(self) -> float | None:
        """Standard deviation of the losses over seeds; None with fewer than two seeds."""
        return stdev(self.losses.values()) if len(self.losses) > 1 else None

    @property
    def verdict(self) -> str:
        """`better` or `worse` if the interval excludes 0, otherwise `not significant`; empty without an interval."""
        if self.interval is None:
            return ""
        low, high = self.interval
        return "better" if low > 0 else "worse" if high < 0 else "not significant"


def compare(results: Sequence[Result], arms: Sequence[ArmPlan], baseline: str) -> list[Summary]:
    """Summarize every arm, in order; losses are paired by seed, so that the effect of a seed cancels."""
    losses: dict[str, dict[int, float]] = {arm.arm.name: {} for arm in arms}
    for result in finished_results(results):
        losses[result.run.arm][result.run.seed] = result.loss
    return [_summary(arm, losses[arm.arm.name], losses[baseline], arm.arm.name == baseline) for arm in arms]


def _summary(arm: ArmPlan, losses: dict[int, float], baseline: dict[int, float], is_baseline: bool) -> Summary:
    common = sorted(losses.keys() & baseline.keys())
    if is_baseline or not common:
        return Summary(arm, losses)
    gains = [baseline[seed] - losses[seed] for seed in common]
    if len(gains) < 2:
        return Summary(arm, losses, len(gains), mean(gains))
    if max(gains) - min(gains) < _ROUNDING:  # such as all 0, if a setting has no effect: there is nothing to test
        return Summary(arm, losses, len(gains), gains[0], (gains[0], gains[0]))
    tested = stats.ttest_1samp(gains, 0.0)
    low, high = tested.confidence_interval(_CONFIDENCE)
    return Summary(arm, losses, len(gains), mean(gains), (float(low), float(high)), float(tested.pvalue))
