"""Judge claims by the reports of studies: each holds, does not hold, or is undecided.

Every condition names a region for the difference of two arms. It holds if one-sided tests at the ends of the region
show that the difference is inside, and fails if they show that it is outside. Amounts that are the same for every seed,
such as memory, are compared without a test. Holm's correction is over the claims that tests decide.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from statistics import stdev
from typing import Any, Literal, TypeAlias

import numpy as np
from scipy import stats

from coe_megatron.study.report.claims_file import OF_ONE_NUMBER, Claim, Condition
from coe_megatron.study.report.equal_memory import Size, front, loss_at
from coe_megatron.study.report.report_files import Arm, ReportFiles, read_report
from coe_megatron.study.report.statistics import LEVEL, MIN_SEEDS, PairedSample, holm

Bound: TypeAlias = tuple[bool, float]  # whether the difference is above it, and the bound
Values: TypeAlias = dict[int, float]  # by seed

_ROUNDING = 1e-9
_COLUMNS = {"accuracy": "answer_accuracy", "rise": "largest_rise", "memory": "memory_measured", "loss_sd": "valid_loss"}


@dataclass(frozen=True)
class SpreadRatio:
    """The s.d. of one quantity over that of another, minus 1, for pairs of normal values (Pitman 1939, Morgan 1939,
    Biometrika 31): the variances are equal exactly if sum and difference of the pairs are uncorrelated.
    """

    pairs: Sequence[tuple[float, float]]

    @property
    def mean(self) -> float:
        """The ratio of the standard deviations, minus 1."""
        own, other = zip(*self.pairs, strict=True)
        return stdev(own) / stdev(other) - 1

    def p_below(self, bound: float) -> float:
        """p-value of the one-sided test that the true value is below a bound, which is above -1."""
        return self._p_value(bound, "less")

    def p_above(self, bound: float) -> float:
        """As `p_below`, that it is above the bound."""
        return self._p_value(bound, "greater")

    def _p_value(self, bound: float, side: Literal["less", "greater"]) -> float:
        own, other = np.array(self.pairs).T
        other = other * (1 + bound)
        if np.ptp(own - other) < _ROUNDING * np.ptp(own):
            return 1.0  # the same s.d.
        return float(stats.pearsonr(own + other, own - other, alternative=side).pvalue)

    def interval(self) -> tuple[float, float]:
        """95 % confidence interval: the values that the tests do not reject."""
        freedom = len(self.pairs) - 2
        correlation = float(np.corrcoef(np.array(self.pairs).T)[0, 1])
        wide = 1 + 2 * (1 - correlation**2) * float(stats.t.ppf(1 - LEVEL / 2, freedom)) ** 2 / freedom
        reach, ratio = math.sqrt(wide + math.sqrt(wide**2 - 1)), 1 + self.mean
        return ratio / reach - 1, ratio * reach - 1

    def seeds_for(self, distances: Sequence[float], level: float) -> None:
        """Not known."""


@dataclass(frozen=True)
class Finding:
    """What the reports say about a condition.

    Attributes:
        arm: labels of the arm; of `other` likewise.
        evidence: the difference with its tests; the amount itself if it is the same for every seed; None if `reason`
            says why there is none.
        seeds: number of seeds that both arms have finished.
        p_holds: p-value of the test that the condition holds; 1 without evidence.
        p_fails: p-value of the test that it does not hold.
        reason: why there is no evidence, in words.
        seeds_to_decide: number of seeds that would probably decide; None if decided or not known.
    """

    condition: Condition
    arm: str = ""
    other: str = ""
    evidence: PairedSample | SpreadRatio | float | None = None
    seeds: int = 0
    p_holds: float = 1.0
    p_fails: float = 1.0
    reason: str = ""
    seeds_to_decide: int | None = None

    @property
    def is_tested(self) -> bool:
        """Whether it has p-values of a test."""
        return isinstance(self.evidence, PairedSample | SpreadRatio)

    @property
    def estimate(self) -> float | None:
        """The difference; a fraction of the other's value for relative measures."""
        return self.evidence.mean if isinstance(self.evidence, PairedSample | SpreadRatio) else self.evidence

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the difference, not corrected."""
        return self.evidence.interval() if isinstance(self.evidence, PairedSample | SpreadRatio) else None


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim.

    Attributes:
        p_adjusted: the smaller p-value of whether it holds and does not hold, by Holm's correction over the claims that
            tests decide; None if no test does.
        tests: number of these claims.
    """

    claim: Claim
    findings: Sequence[Finding]
    p_adjusted: float | None = None
    tests: int = 0

    @property
    def p_holds(self) -> float:
        """p-value of the claim: all conditions hold."""
        return max(finding.p_holds for finding in self.findings)

    @property
    def p_fails(self) -> float:
        """p-value of its opposite: a condition does not hold, by Bonferroni's correction over those that are tested."""
        tested = sum(finding.is_tested for finding in self.findings)
        return min(min(1.0, finding.p_fails * (tested if finding.is_tested else 1)) for finding in self.findings)

    @property
    def result(self) -> str:
        """`holds`, `does not hold` or `undecided`, at the level of 0.05."""
        p_value = min(self.p_holds, self.p_fails) if self.p_adjusted is None else self.p_adjusted
        if p_value >= LEVEL:
            return "undecided"
        # A difference may be shown to be on the right side, and to be smaller than the margin: then it fails.
        fails = self.p_fails < self.p_holds or self.p_fails * max(1, self.tests) < LEVEL
        return "does not hold" if fails else "holds"


def judge(claims: Sequence[Claim]) -> list[Verdict]:
    """Judge all claims of a file.

    Raises:
        ConfigError: a report is damaged, or has no arm that a condition names; one line.
    """
    read = cache(lambda folder: read_report(Path(folder)))
    verdicts = []
    for number, claim in enumerate(claims):
        where = [f"claims.{number}.all.{place}" for place in range(len(claim.all))]
        verdicts.append(Verdict(claim, [_find(*each, read) for each in zip(where, claim.all, strict=True)]))
    return _corrected(verdicts)


def _corrected(verdicts: Sequence[Verdict]) -> list[Verdict]:
    tested = [number for number, each in enumerate(verdicts) if any(found.is_tested for found in each.findings)]
    adjusted = holm([min(verdicts[number].p_holds, verdicts[number].p_fails) for number in tested])
    by_number = dict(zip(tested, adjusted, strict=True))
    return [
        replace(
            each,
            findings=[_with_seeds(found, len(tested)) for found in each.findings],
            p_adjusted=by_number.get(number),
            tests=len(tested),
        )
        for number, each in enumerate(verdicts)
    ]


def _with_seeds(found: Finding, tests: int) -> Finding:
    """The finding with the seeds that would decide it, if it is undecided."""
    if not isinstance(found.evidence, PairedSample) or min(found.p_holds, found.p_fails) * tests < LEVEL:
        return found
    sample, (inside, outsides) = found.evidence, _regions(found.condition)
    needed = [
        sample.seeds_for([sample.mean - bound if above else bound - sample.mean for above, bound in region], level)
        for region in (inside, *outsides)
        for level in [LEVEL / tests / _sides(region)]
    ]
    return replace(found, seeds_to_decide=min(filter(None, needed), default=None))


def _find(where: str, condition: Condition, read: Callable[[str], ReportFiles | None]) -> Finding:
    if (report := read(condition.report)) is None:
        return Finding(condition, reason="there is no report yet")
    others = condition.other if isinstance(condition.other, list) else [condition.other]
    arm = report.find(f"{where}.arm", condition.where, condition.arm)
    compared = [report.find(f"{where}.other", condition.where, other) for other in others]
    found = Finding(condition, arm.title, ", ".join(other.title for other in compared))
    if condition.measure in OF_ONE_NUMBER:
        return _of_amounts(found, report, arm, compared[0])
    own, other = _values(report, condition, arm), _other_values(report, condition, arm, compared)
    if condition.than_in is not None:
        labels = condition.where | condition.than_in
        inner = [
            report.find(f"{where}.than_in", labels, _relabelled(each, condition.than_in)) for each in (arm, *compared)
        ]
        there, other_there = (_values(report, condition, each) for each in inner)
        own = _differences(own, other)
        other = _differences(there, other_there)
    return _tested(found, own, other)


def _relabelled(arm: Arm, labels: Mapping[str, Any]) -> dict[str, Any]:
    return {**arm.labels, **labels}


def _values(report: ReportFiles, condition: Condition, arm: Arm) -> Values:
    loss = "valid_loss" if condition.set is None else f"valid_loss_{condition.set}"
    return report.values(arm, _COLUMNS.get(condition.measure, loss))


def _other_values(report: ReportFiles, condition: Condition, arm: Arm, others: Sequence[Arm]) -> Values:
    if condition.measure != "loss_at_equal_memory":
        return _values(report, condition, others[0])
    sizes = [(each, _peak(report, each), report.values(each, "valid_loss")) for each in others]
    memory = _peak(report, arm)
    points = front([Size(each.name, peak, losses) for each, peak, losses in sizes if peak and losses])
    return loss_at(memory, points) if memory else {}


def _peak(report: ReportFiles, arm: Arm) -> float | None:
    return max(report.values(arm, "memory_measured").values(), default=None)


def _differences(own: Values, other: Values) -> Values:
    return {seed: own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())}


def _of_amounts(found: Finding, report: ReportFiles, arm: Arm, other: Arm) -> Finding:
    """Compare amounts that are the same for every seed; measured memory is the largest over seeds."""
    column = _COLUMNS.get(found.condition.measure, found.condition.measure)
    own, base = (max(report.values(each, column).values(), default=0.0) for each in (arm, other))
    if own <= 0 or base <= 0:
        return replace(found, reason="an arm has no finished run with a value")
    value = own / base - 1
    holds = _holds(value, found.condition)
    seeds = len(report.values(arm, column).keys() & report.values(other, column).keys())
    return replace(found, evidence=value, seeds=seeds, p_holds=float(not holds), p_fails=float(holds))


def _tested(found: Finding, own: Values, other: Values) -> Finding:
    """Compare values by seed."""
    common = sorted(own.keys() & other.keys())
    found = replace(found, seeds=len(common))
    if own and not other and found.condition.measure == "loss_at_equal_memory":
        return replace(found, reason="the arm's memory is not between those of finished sizes")
    if not own or not other:
        return replace(found, reason="an arm has no finished run with a value")
    if len(common) < MIN_SEEDS:
        return replace(found, reason=f"fewer than {MIN_SEEDS} seeds in common")
    evidence: PairedSample | SpreadRatio = PairedSample([own[seed] - other[seed] for seed in common])
    if found.condition.measure == "loss_sd":
        if min(len({values[seed] for seed in common}) for values in (own, other)) == 1:
            return replace(found, reason="the loss of an arm does not vary")
        evidence = SpreadRatio([(own[seed], other[seed]) for seed in common])
    inside, outsides = _regions(found.condition)
    return replace(
        found,
        evidence=evidence,
        p_holds=_p_value(evidence, inside),
        p_fails=min(_p_value(evidence, region) for region in outsides),
    )


def _holds(value: float, condition: Condition) -> bool:
    by, margin = condition.by, condition.margin or 0.0
    return {
        "less": value < 0 and value <= -by,
        "greater": value > 0 and value >= by,
        "equal": abs(value) <= margin,
        "not_less": value >= -margin,
        "not_greater": value <= margin,
    }[condition.relation]


def _regions(condition: Condition) -> tuple[list[Bound], list[list[Bound]]]:
    """Where the difference is if the condition holds, and where if it does not: bounds that it is above or below."""
    by, margin = condition.by, condition.margin or 0.0
    return {
        "less": ([(False, -by)], [[(True, -max(by, margin))]]),
        "greater": ([(True, by)], [[(False, max(by, margin))]]),
        "equal": ([(True, -margin), (False, margin)], [[(True, margin)], [(False, -margin)]]),
        "not_less": ([(True, -margin)], [[(False, -margin)]]),
        "not_greater": ([(False, margin)], [[(True, margin)]]),
    }[condition.relation]


def _sides(region: Sequence[Bound]) -> int:
    """2 if one bound is tested, at half the level as in a two-sided test; 1 for two one-sided tests of equivalence."""
    return 2 if len(region) == 1 else 1


def _p_value(evidence: PairedSample | SpreadRatio, region: Sequence[Bound]) -> float:
    found = [evidence.p_above(bound) if above else evidence.p_below(bound) for above, bound in region]
    return min(1.0, _sides(region) * max(1.0 if p is None else p for p in found))
