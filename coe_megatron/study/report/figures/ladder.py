"""Loss against tokens for every width of a ladder, with the law and what was predicted."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes

from coe_megatron.study.plan.amounts import Amounts
from coe_megatron.study.plan.ladder import TOKENS, WIDTH
from coe_megatron.study.plan.law import Law, Point
from coe_megatron.study.plan.names import joined
from coe_megatron.study.plan.registration import Prediction, Registration, point_of
from coe_megatron.study.report.comparison import Summary
from coe_megatron.study.report.figures.panels import Facet, facet_grid, plot_mean
from coe_megatron.study.report.figures.style import (
    LITERAL,
    LOSS_LABEL,
    TEXT,
    ArmStyle,
    StudyFigure,
    numbered_style,
    printed,
    short_label,
)

_PREDICTED = "predicted"  # name of the predictions in the legend
_BESIDE = 3  # most panels side by side


@printed
def loss_against_tokens(summaries: Sequence[Summary], law: Law, registered: Registration | None) -> StudyFigure:
    """One panel for each design: measured means, the law as lines, and registered predictions with their intervals."""
    amounts = Amounts()
    points = {summary.arm.arm.name: point_of(summary.arm.arm, amounts) for summary in summaries}
    predictions = registered.predictions if registered else {}
    widths = list(dict.fromkeys(summary.arm.arm.labels[WIDTH] for summary in summaries))
    designs: dict[str, list[Summary]] = {}
    for summary in summaries:
        rest = {axis: label for axis, label in summary.arm.arm.labels.items() if axis not in (WIDTH, TOKENS)}
        designs.setdefault(joined(rest) if rest else "", []).append(summary)
    styles = {width: numbered_style(number, 0, width, f"width {width}", {}) for number, width in enumerate(widths)}
    labels = {width: style.label for width, style in styles.items()} | {_PREDICTED: "registered prediction"}
    names = [*widths, *([_PREDICTED] if predictions else [])]
    beside = min(len(designs), _BESIDE)
    groups = [Facet("", names)] if len(designs) <= _BESIDE else [Facet(short_label(each), names) for each in designs]
    grid = facet_grid(groups, labels, beside if len(groups) == 1 else 1, height=2.4)
    every = [axes for part in grid.parts for axes in part.axes]
    for axes in every[1:]:
        axes.sharey(every[0])
    for axes, (design, members) in zip(every, designs.items(), strict=True):
        axes.set_title(short_label(design), loc="left", fontsize=TEXT, **LITERAL)
        _plot(axes, members, points, law, predictions, styles)
    grid.finish(labels)
    fitted = "the smaller widths" if registered else "the finished runs"
    diamonds = " Open diamonds are registered predictions with their 95 % intervals." if predictions else ""
    return StudyFigure(
        "ladder",
        "Final validation loss against tokens, by width. Marks are means over seeds, bars their 95 % confidence "
        f"intervals, and lines the law that was fitted to {fitted}.{diamonds}",
        f"The law's floor is {law.E:.3f} nats per token, with exponents of {law.alpha:.3f} for parameters and "
        f"{law.beta:.3f} for tokens. {' '.join(_described(summaries, predictions))}".strip(),
        grid.figure,
    )


def _plot(
    axes: Axes,
    members: Sequence[Summary],
    points: Mapping[str, Point],
    law: Law,
    predictions: Mapping[str, Prediction],
    styles: Mapping[str, ArmStyle],
) -> None:
    tokens = [points[summary.arm.arm.name].tokens for summary in members]
    axes.set_xscale("log")
    if known := [name for summary in members if (name := summary.arm.arm.name) in predictions]:
        losses = np.array([predictions[name].loss for name in known])
        low, high = np.array([predictions[name].interval for name in known]).T
        axes.errorbar(
            [points[name].tokens for name in known],
            losses,
            [losses - low, high - losses],
            color="black",
            marker="D",
            fillstyle="none",
            markersize=7,
            linestyle="",
            elinewidth=0.8,
            capsize=3,
            label=_PREDICTED,
        )
    for width, style in styles.items():
        own = [summary for summary in members if summary.arm.arm.labels[WIDTH] == width]
        if not own:
            continue
        at = np.geomspace(min(tokens), max(tokens), 40)
        one = points[own[0].arm.arm.name]
        line = [law.loss(replace(one, tokens=float(each))) for each in at]
        axes.plot(at, line, color=style.colour, linewidth=0.9, linestyle=style.dash)
        axes.plot([], [], **style.marked, linestyle=style.dash, linewidth=0.9, label=width)
        for summary in own:
            if summary.losses:
                plot_mean(axes, points[summary.arm.arm.name].tokens, summary.losses.values(), style)
    axes.set_xlabel("tokens")
    axes.set_ylabel(LOSS_LABEL)


def _described(summaries: Sequence[Summary], predictions: Mapping[str, Prediction]) -> Iterator[str]:
    for summary in summaries:
        if (predicted := predictions.get(summary.arm.arm.name)) is not None:
            low, high = predicted.interval
            measured = f"measured {summary.mean:.4f}" if summary.mean is not None else "not yet measured"
            yield f"{summary.arm.arm.title}: predicted {predicted.loss:.4f} ({low:.4f} to {high:.4f}), {measured}."
