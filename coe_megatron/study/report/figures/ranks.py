"""Tokens per second, and parallel efficiency, over the number of ranks."""

from collections.abc import Mapping, Sequence
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from coe_megatron.study.report.figures.panels import Facet, facet_grid
from coe_megatron.study.report.figures.style import (
    GREY,
    ArmStyle,
    StudyFigure,
    numbered_style,
    printed,
    unique_labels,
)
from coe_megatron.study.report.throughput import OverRanks


@printed
def throughput(found: Sequence[OverRanks]) -> StudyFigure:
    """Measured and predicted tokens per second over ranks, and the efficiency."""
    labels = dict(enumerate(unique_labels([each.label for each in found])))
    styles = [numbered_style(number, 0, str(number), labels[number], {}) for number in labels]
    named = {str(number): label for number, label in labels.items()}
    grid = facet_grid([Facet("", list(named))], named, panels=2, height=2.3)
    speed, efficiency = grid.parts[0].axes
    for each, style in zip(found, styles, strict=True):
        measured = {point.ranks: mean(point.measured) for point in each.points if point.measured}
        predicted = {point.ranks: point.predicted for point in each.points if point.predicted is not None}
        _draw(speed, measured, predicted, style)
        _draw(efficiency, each.efficiencies(predicted=False), each.efficiencies(predicted=True), style)
    ranks = sorted({point.ranks for each in found for point in each.points})
    for axes in (speed, efficiency):
        axes.set_xscale("log")
        axes.set_xticks(ranks, [f"{count:,}" for count in ranks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("ranks")
    speed.set_yscale("log")
    speed.set_ylabel("tokens per second")
    efficiency.axhline(1, color=GREY, linewidth=0.6)
    efficiency.set_ylim(bottom=0)
    efficiency.set_ylabel("parallel efficiency")
    grid.finish(named)
    return StudyFigure(
        "ranks",
        "Tokens per second over the number of ranks, and tokens per second and rank over those of the fewest ranks. "
        "Marks with lines are measured, as means over seeds; dashed lines are predicted from the machine file.",
        " ".join(map(_description, found)),
        grid.figure,
    )


def _draw(axes: Axes, measured: Mapping[int, float], predicted: Mapping[int, float], style: ArmStyle) -> None:
    axes.plot(list(predicted), list(predicted.values()), color=style.colour, linestyle="--", linewidth=1.0)
    axes.plot(list(measured), list(measured.values()), **style.drawn)


def _description(found: OverRanks) -> str:
    parts = []
    for point in found.points:
        said = [f"{mean(point.measured):,.0f} measured"] if point.measured else []
        said += [] if point.predicted is None else [f"{point.predicted:,.0f} predicted"]
        parts.append(f"{point.ranks:,} rank{'s' * (point.ranks > 1)} {' and '.join(said) or 'unknown'}")
    return f"{found.label or 'All arms'}: {', '.join(parts)} tokens per second."
