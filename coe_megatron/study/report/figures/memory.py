"""Memory of a rank: against loss, against its prediction, and by component."""

from collections.abc import Mapping, Sequence
from statistics import mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from coe_megatron.study.report.comparison import Summary
from coe_megatron.study.report.figures.style import (
    COLOURS,
    GREY,
    HATCHES,
    LITERAL,
    LOSS_LABEL,
    MIB,
    ArmStyle,
    StudyFigure,
    add_legend,
    by_arm,
    new_figure,
    plot_with_range,
    style_axes,
)
from coe_megatron.study.report.results import Result


def loss_against_memory(
    summaries: Sequence[Summary], results: Sequence[Result], styles: Mapping[str, ArmStyle]
) -> StudyFigure:
    """Final loss against measured memory, with the Pareto front."""
    figure, grid = new_figure()
    axes: Axes = grid[0, 0]
    style_axes(axes)
    measured = {name: mean(result.memory for result in runs) / MIB for name, runs in by_arm(results)}
    points = []
    for summary in summaries:
        name = summary.arm.arm.name
        if name in measured and summary.mean is not None:
            plot_with_range(axes, measured[name], summary, styles[name])
            points.append((measured[name], summary.mean))
    front = pareto(points)
    axes.step([x for x, _ in front], [y for _, y in front], where="post", color=GREY, linestyle=":", zorder=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("measured peak memory per rank (MiB)")
    axes.set_ylabel(LOSS_LABEL)
    add_legend(figure, axes, styles)
    return StudyFigure(
        "loss-against-memory",
        "Final validation loss against memory. Marks are means over seeds, bars range from the lowest to the highest "
        "seed. The dotted line is the Pareto front: no arm has both less memory and a lower loss than an arm on it.",
        figure,
    )


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto front of points (lower is better in both coordinates), sorted by the first coordinate."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def memory(results: Sequence[Result], styles: Mapping[str, ArmStyle]) -> StudyFigure:
    """Predicted against measured memory."""
    figure, grid = new_figure(width=5.2, height=4.8)
    axes: Axes = grid[0, 0]
    style_axes(axes)
    for name, runs in by_arm(results):
        style, predicted = styles[name], runs[0].arm.memory / MIB
        measured = [result.memory / MIB for result in runs]
        axes.plot([predicted] * len(runs), measured, **style.marked, linestyle="", label=style.name, alpha=0.8)
    amounts = [amount / MIB for result in results for amount in (result.arm.memory, result.memory)]
    ends = 0.95 * min(amounts), 1.05 * max(amounts)
    axes.plot(ends, ends, color=GREY, linewidth=1)
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("predicted peak memory per rank (MiB)")
    axes.set_ylabel("measured peak (MiB)")
    add_legend(figure, axes, styles)
    return StudyFigure(
        "memory", "Predicted against measured peak memory per rank; on the line the prediction is exact.", figure
    )


def memory_by_component(results: Sequence[Result], styles: Mapping[str, ArmStyle]) -> StudyFigure:
    """Predicted memory by component."""
    arms = [(styles[name].label, runs[0].arm.components, runs) for name, runs in by_arm(results)]
    figure, grid = new_figure(height=1.4 + 0.38 * len(arms))
    axes: Axes = grid[0, 0]
    style_axes(axes)
    starts = np.zeros(len(arms))
    for name, colour, hatch in zip(arms[0][1], COLOURS, HATCHES, strict=False):
        amounts = np.array([parts[name] / MIB for _, parts, _ in arms])
        bars = axes.barh(range(len(arms)), amounts, 0.6, starts, color=colour, hatch=hatch, edgecolor="white")
        bars.set_label(name.replace("_", " "))
        starts += amounts
    measured = [max(result.memory for result in runs) / MIB for _, _, runs in arms]
    axes.plot(measured, range(len(arms)), "|", color="black", markersize=16, markeredgewidth=2, label="measured peak")
    axes.set_yticks(range(len(arms)), [label for label, _, _ in arms], **LITERAL)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel("peak memory per rank (MiB)")
    handles, labels = axes.get_legend_handles_labels()
    figure.set_figheight(figure.get_figheight() + 0.5)
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return StudyFigure(
        "memory-by-component",
        "Predicted peak memory of the largest rank, by component; strokes are the measured peaks.",
        figure,
    )
