"""Tokens per second over the number of ranks, measured and predicted: strong and weak scaling."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

from coe_megatron.study.report.comparison import Summary
from coe_megatron.study.report.figures.varied import axis_groups
from coe_megatron.study.report.markdown_text import escaped, table
from coe_megatron.study.report.results import Result

_TEXT = (
    "Arms that differ in their ranks alone, and in what the study changes with them. Measured is the median of the "
    "logged steps but the first, as a mean over seeds; predicted is the time of a step on the study's machine. "
    "Efficiency is tokens per second and rank, over that of the fewest ranks: 1 is perfect scaling."
)


@dataclass(frozen=True)
class Throughput:
    """Of an arm.

    Attributes:
        measured: tokens per second of each finished run.
        predicted: tokens per second; None if the machine is unknown.
    """

    ranks: int
    measured: Sequence[float]
    predicted: float | None


@dataclass(frozen=True)
class OverRanks:
    """Arms that differ in their ranks, and in what the study changes with them.

    Attributes:
        label: what they have in common.
        points: by ascending ranks, each number once.
    """

    label: str
    points: Sequence[Throughput]

    def efficiencies(self, predicted: bool) -> dict[int, float]:
        """Tokens per second and rank over those of the fewest ranks, by ranks; of the points that have them."""
        found = {each.ranks: value for each in self.points if (value := _value(each, predicted)) is not None}
        alone = next((value / ranks for ranks, value in found.items()), 0.0)
        return {ranks: value / ranks / alone for ranks, value in found.items()}


def over_ranks(summaries: Sequence[Summary], finished: Sequence[Result]) -> list[OverRanks]:
    """What each axis that varies the ranks shows; empty if none does."""
    found = []
    for axis in summaries[0].arm.arm.labels if summaries else ():
        for labels, group in axis_groups(summaries, axis):
            ranks = [summary.arm.ranks for summary in group]
            if len(set(ranks)) == len(ranks) > 1:
                points = (_throughput(summary, finished) for summary in group)
                found.append(OverRanks(" ".join(labels), sorted(points, key=lambda point: point.ranks)))
    return found


def ranks_table(found: Sequence[OverRanks]) -> str:
    """The same as a section; empty if no axis varies the ranks."""
    if not found:
        return ""
    rows = []
    for each in found:
        efficiencies = [each.efficiencies(predicted) for predicted in (False, True)]
        for point in each.points:
            measured, predicted = _value(point, False), _value(point, True)
            error = f"{predicted / measured - 1:+.1%}" if measured and predicted else "-"
            cells = [_number(value, ",.0f") for value in (measured, predicted)]
            cells += [error, *(_number(of.get(point.ranks), ".2f") for of in efficiencies)]
            rows.append([escaped(each.label), f"{point.ranks:,}", *cells])
    columns = ["arms", "ranks", "tokens/s, measured", "predicted", "error", "efficiency, measured", "predicted"]
    return f"## Scaling over ranks\n\n{_TEXT}\n\n{table(columns, rows)}"


def _throughput(summary: Summary, finished: Sequence[Result]) -> Throughput:
    arm, training = summary.arm, summary.arm.arm.config.training
    tokens = training.global_batch * arm.arm.config.model.seq_length
    steps = [result.steps[1:] for result in finished if result.run.arm == arm.arm.name]
    measured = [tokens / median(line["step_seconds"] for line in lines) for lines in steps if lines]
    predicted = tokens * training.steps / arm.seconds.steps if arm.seconds else None
    return Throughput(arm.ranks, measured, predicted)


def _value(point: Throughput, predicted: bool) -> float | None:
    if predicted:
        return point.predicted
    return mean(point.measured) if point.measured else None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
