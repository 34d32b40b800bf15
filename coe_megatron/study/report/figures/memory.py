"""Memory of a rank: loss against it, and its components."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from coe_megatron.study.report.comparison import Summary
from coe_megatron.study.report.figures.descriptions import ranking
from coe_megatron.study.report.figures.label_column import label_column
from coe_megatron.study.report.figures.panels import facets, mean_and_half_width, row_panels
from coe_megatron.study.report.figures.style import (
    COLOURS,
    DOUBLE,
    GREY,
    HATCHES,
    LITERAL,
    LOSS_LABEL,
    MIB,
    SINGLE,
    SMALL,
    TEXT,
    ArmStyle,
    StudyFigure,
    add_letters,
    by_arm,
    printed,
    style_axes,
    text_width,
)
from coe_megatron.study.report.results import Result

_PANEL = 2.3  # height in inches


@printed
def loss_against_memory(
    summaries: Sequence[Summary], results: Sequence[Result], styles: Mapping[str, ArmStyle]
) -> StudyFigure:
    """Final loss against measured memory, with the Pareto front; every arm is named at the height of its mark."""
    memory = {name: [result.memory / MIB for result in runs] for name, runs in by_arm(results)}
    losses = {each.arm.arm.name: list(each.losses.values()) for each in summaries if each.losses}
    points = {name: (mean(memory[name]), mean(losses[name])) for name in losses if name in memory}
    groups = facets(list(points), styles)
    widest = max(text_width(styles[name].label) for name in points)
    figure = Figure(figsize=(SINGLE if widest < 0.9 else DOUBLE, _PANEL * len(groups) + 0.2), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    front = pareto(list(points.values()))
    for group, axes in zip(groups, panels, strict=True):
        style_axes(axes)
        axes.set_title(group.title, loc="left", fontsize=TEXT, **LITERAL)
        axes.step([x for x, _ in front], [y for _, y in front], where="post", color=GREY, linestyle=":", zorder=0)
        others = [point for name, point in points.items() if name not in group.names]
        axes.plot([x for x, _ in others], [y for _, y in others], ".", color="#bbbbbb", zorder=0)
        for name in group.names:
            _plot_point(axes, memory[name], losses[name], styles[name])
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_ylabel(LOSS_LABEL)
    panels[-1].set_xlabel("measured peak memory per rank (MiB)")
    for group, axes in zip(groups, panels, strict=True):  # when the limits of the shared axes are known
        label_column(axes, {name: points[name] for name in group.names}, styles, _PANEL - 0.6)
    add_letters(list(panels))
    return StudyFigure(
        "loss-against-memory",
        "Final validation loss against memory. Marks are means over seeds, bars their 95 % confidence intervals. The "
        "dotted line is the Pareto front of the means: no arm has both less memory and a lower loss than an arm on it."
        + " Faint dots are the arms of the other panels."
        * (len(groups) > 1),
        _description(points, front, styles),
        figure,
    )


def _plot_point(axes: Axes, memory: Sequence[float], losses: Sequence[float], style: ArmStyle) -> None:
    (x, across), (y, along) = mean_and_half_width(memory), mean_and_half_width(losses)
    axes.errorbar(x, y, along or None, across or None, **style.marked, linestyle="", elinewidth=0.8, capsize=2)


def _description(
    points: Mapping[str, tuple[float, float]], front: Sequence[tuple[float, float]], styles: Mapping[str, ArmStyle]
) -> str:
    on_front = [
        f"{styles[name].label} ({points[name][0]:.0f} MiB, {points[name][1]:.4f} nats per token)"
        for name in sorted(points, key=points.__getitem__)
        if points[name] in front
    ]
    loss = ranking({styles[name].label: y for name, (_, y) in points.items()}, ".4f", "nats per token")
    memory = ranking({styles[name].label: x for name, (x, _) in points.items()}, ".0f", "MiB")
    return f"On the Pareto front: {', '.join(on_front)}. Loss. {loss} Memory. {memory}"


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto front of points (lower is better in both coordinates), sorted by the first coordinate."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


@printed
def memory_by_component(results: Sequence[Result], styles: Mapping[str, ArmStyle]) -> StudyFigure:
    """Predicted memory by component, with the measured peak."""
    runs, labels = dict(by_arm(results)), {name: style.label for name, style in styles.items()}
    panels = row_panels(facets(list(runs), styles), labels, ["peak memory per rank (MiB)"])
    for names, (axes,) in panels.parts:
        _plot_components(axes, [runs[name] for name in names])
    handles, names = panels.parts[0][1][0].get_legend_handles_labels()
    panels.figure.set_size_inches(DOUBLE, panels.figure.get_figheight() + 0.5)
    panels.figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=SMALL)
    return StudyFigure(
        "memory-by-component",
        "Predicted peak memory of the largest rank, by component; strokes are the largest measured peaks.",
        f"Predicted and measured peak memory. {'; '.join(_peaks(runs, labels))}.",
        panels.figure,
    )


def _plot_components(axes: Axes, arms: Sequence[Sequence[Result]]) -> None:
    starts = np.zeros(len(arms))
    for name, colour, hatch in zip(arms[0][0].arm.components, COLOURS, HATCHES, strict=False):
        amounts = np.array([runs[0].arm.components[name] / MIB for runs in arms])
        bars = axes.barh(range(len(arms)), amounts, 0.6, starts, color=colour, hatch=hatch, edgecolor="white")
        bars.set_label(name.replace("_", " "))
        starts += amounts
    measured = [max(result.memory for result in runs) / MIB for runs in arms]
    axes.plot(measured, range(len(arms)), "|", color="black", markersize=9, markeredgewidth=1.6, label="measured peak")


def _peaks(runs: Mapping[str, Sequence[Result]], labels: Mapping[str, str]) -> Iterator[str]:
    for name, own in runs.items():
        predicted, measured = own[0].arm.memory, max(result.memory for result in own)
        ratio = measured / predicted
        yield f"{labels[name]} {predicted / MIB:.0f} MiB, measured {measured / MIB:.0f} MiB ({ratio:.2f} times)"
