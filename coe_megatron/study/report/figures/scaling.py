"""Final loss against the settings that a study varies."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from coe_megatron.study.report.comparison import Summary
from coe_megatron.study.report.figures.style import (
    GREY,
    LOSS_LABEL,
    ArmStyle,
    StudyFigure,
    add_legend,
    new_figure,
    plot_with_range,
    style_axes,
)

_SCALED: dict[str, tuple[str, Callable[[Any], float]]] = {
    "iterations": ("C, iterations", lambda config: config.chain.iterations),
    "choices": ("K, experts per token and iteration", lambda config: config.moe.topk),
    "experts": ("N, routed experts", lambda config: config.moe.num_experts),
    "layers": ("L, layers", lambda config: config.model.num_layers),
    "steps": ("steps", lambda config: config.training.steps),
    "learning-rate": ("learning rate", lambda config: config.optimizer.lr),
}
_MIN_VALUES = {"learning-rate": 3}  # values; two may belong to two norm placements instead of a separate axis


def scaling(summaries: Sequence[Summary], styles: Mapping[str, ArmStyle]) -> Iterator[StudyFigure]:
    """Final loss against C, K, N, L, steps or learning rate, if an axis of the study varies it."""
    known = [summary for summary in summaries if summary.mean is not None]
    for name, (title, value) in _SCALED.items():
        groups = [
            group
            for group in _differing_in_one_axis(known)
            if len(_distinct_values(group, value)) >= _MIN_VALUES.get(name, 2)
        ]
        if groups:
            shown = [summary for summary in known if any(summary in group for group in groups)]
            yield _scaling_figure(f"scaling-{name}", title, value, shown, groups, styles)


def _scaling_figure(
    name: str,
    title: str,
    value: Callable[[Any], float],
    shown: Sequence[Summary],
    groups: Sequence[Sequence[Summary]],
    styles: Mapping[str, ArmStyle],
) -> StudyFigure:
    figure, grid = new_figure()
    axes: Axes = grid[0, 0]
    style_axes(axes)
    for summary in shown:
        plot_with_range(axes, value(summary.arm.arm.config), summary, styles[summary.arm.arm.name])
    for group in groups:
        if len(_distinct_values(group, value)) == len(
            group
        ):  # otherwise two arms have the same value, and no line is right
            line = sorted((value(summary.arm.arm.config), summary.mean or 0.0) for summary in group)
            axes.plot(*zip(*line, strict=True), color=GREY, linewidth=0.8, zorder=1)
    ticks = _distinct_values(shown, value)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(title)
    axes.set_ylabel(LOSS_LABEL)
    add_legend(figure, axes, styles)
    return StudyFigure(
        name,
        f"Final validation loss against {title}. Marks are means over seeds, bars range from the lowest to the highest "
        "seed. Lines join arms that differ in only one axis of the study, which may change other settings too.",
        figure,
    )


def _differing_in_one_axis(summaries: Sequence[Summary]) -> Iterator[list[Summary]]:
    """For every axis, the groups of arms with the same labels on all other axes."""
    for axis in summaries[0].arm.arm.labels if summaries else ():

        def others(summary: Summary, axis: str = axis) -> tuple[str, ...]:
            return tuple(label for name, label in summary.arm.arm.labels.items() if name != axis)

        for _, group in groupby(sorted(summaries, key=others), key=others):
            yield list(group)


def _distinct_values(summaries: Sequence[Summary], value: Callable[[Any], float]) -> list[float]:
    """Distinct values in ascending order."""
    return sorted({value(summary.arm.arm.config) for summary in summaries})
