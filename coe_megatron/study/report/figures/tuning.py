"""The U-curves of tuning: loss against the values of the tuned setting."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from coe_megatron.study.plan.names import text_of
from coe_megatron.study.plan.tuning import TuningCurve
from coe_megatron.study.report.figures.panels import facet_grid, facets, plot_mean
from coe_megatron.study.report.figures.style import (
    DOUBLE,
    LOSS_LABEL,
    SINGLE,
    ArmStyle,
    StudyFigure,
    printed,
    set_labels,
    short_label,
    text_width,
)


@printed
def tuning_curves(curves: Sequence[TuningCurve], styles: Mapping[str, ArmStyle]) -> StudyFigure:
    """The loss of every arm against the grid, with the chosen values."""
    by_name, labels = {curve.arm: curve for curve in curves}, {name: style.label for name, style in styles.items()}
    groups = facets(list(by_name), styles)
    narrow = len(groups) == 1 and max(text_width(labels[name]) for name in by_name) < SINGLE / 2
    grid = facet_grid(groups, labels, height=2.2, width=SINGLE if narrow else DOUBLE)
    for part in grid.parts:
        (axes,) = part.axes
        _set_grid(axes, curves[0].values, grid.figure.get_figwidth())
        for name in part.names:
            _plot_curve(axes, by_name[name], styles[name])
        axes.set_xlabel(curves[0].setting, parse_math=False)
        axes.set_ylabel(LOSS_LABEL)
    grid.finish(labels)
    return StudyFigure(
        "tuning",
        f"Tuning: final validation loss against {curves[0].setting}. Marks are means over the seeds of tuning, bars "
        "their 95 % confidence intervals. Circles are the chosen values. Crosses at the top are values with a run that "
        "diverged.",
        f"Loss by {curves[0].setting}. {' '.join(_description(curve, labels[curve.arm]) for curve in curves)}",
        grid.figure,
    )


def _places(values: Sequence[Any]) -> list[float]:
    """Where the values are on the axis: numbers at themselves, other values side by side."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return [float(value) if numbers else float(index) for index, value in enumerate(values)]


def _set_grid(axes: Axes, values: Sequence[Any], width: float) -> None:
    """Scale and ticks, in a figure of that width in inches."""
    places = _places(values)
    if min(places) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    set_labels(axes, places, [short_label(text_of(value)) for value in values], width)


def _plot_curve(axes: Axes, curve: TuningCurve, style: ArmStyle) -> None:
    places = _places(curve.values)
    known = [index for index, value in enumerate(curve.means) if value is not None and math.isfinite(value)]
    means = [curve.means[index] or 0.0 for index in known]
    axes.plot([places[index] for index in known], means, **style.drawn)
    for index in known:
        plot_mean(axes, places[index], curve.losses[index].values(), style)
    if (chosen := curve.chosen_index) is not None:
        axes.plot(places[chosen], curve.means[chosen] or 0.0, "o", color=style.colour, fillstyle="none", markersize=10)
    diverged = [place for place, mean in zip(places, curve.means, strict=True) if mean == math.inf]
    axes.plot(diverged, [0.97] * len(diverged), "x", color=style.colour, transform=axes.get_xaxis_transform())


def _description(curve: TuningCurve, label: str) -> str:
    if (index := curve.chosen_index) is None:
        return f"{label}: no value is chosen."
    edge = ", at the edge of the grid" if curve.at_edge else ""
    finite = [mean for mean in curve.means if mean is not None and math.isfinite(mean)]
    return (
        f"{label}: {text_of(curve.chosen)} is best{edge}, with {curve.means[index]:.4f} nats per token; the worst "
        f"value has {max(finite):.4f}."
    )
