"""Gains as forest plots: of every arm over its baseline, and of every label of an axis over a reference label."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from coe_megatron.study.plan.names import joined
from coe_megatron.study.report.comparison import Summary
from coe_megatron.study.report.figures.descriptions import with_interval
from coe_megatron.study.report.figures.panels import Facet, facets, row_panels
from coe_megatron.study.report.figures.style import (
    GREY,
    ArmStyle,
    StudyFigure,
    numbered_style,
    printed,
    short_label,
)
from coe_megatron.study.report.figures.varied import axis_groups
from coe_megatron.study.report.statistics import PairedSample

_READING = (
    "Strokes are seeds, marks their means, and lines the 95 % confidence intervals of the means, paired by seed and "
    "not corrected. Right of 0 is better."
)
_UNIT = "gain in validation loss (nats per token)"


@printed
def gains(summaries: Sequence[Summary], styles: Mapping[str, ArmStyle]) -> StudyFigure:
    """The gain of every arm over its baseline."""
    shown = {each.arm.arm.name: PairedSample(list(each.gains.values())) for each in summaries if each.gains}
    labels = {name: style.label for name, style in styles.items()}
    bases = [joined(each.arm.arm.labels) for each in summaries if each.is_baseline]
    whose = f"the baseline, {bases[0]}" if len(bases) == 1 else "the baseline with the arm's labels on the other axes"
    panels = row_panels(facets(list(shown), styles), labels, [_UNIT])
    for name, row, (axes,) in panels.rows():
        _plot_gain(axes, row, shown[name], styles[name])
    return StudyFigure(
        "gains",
        f"Gain over {whose}. {_READING}",
        f"Gain over {whose}, in nats per token, with 95 % interval. {_as_text(shown, labels)}",
        panels.figure,
    )


@dataclass(frozen=True)
class _Effect:
    """What one label of an axis gains over the reference label, for the same labels on the other axes."""

    label: str
    others: str
    sample: PairedSample


@printed
def effect(axis: str, summaries: Sequence[Summary], number: int) -> StudyFigure | None:
    """The gain of each label of an axis over that of the first baseline, for the same labels on all other axes.

    Of a study with one axis it would be the figure of gains. None if no arm has a counterpart.

    Args:
        number: of the axis, which can have any name, for the name of the figure.
    """
    reference = next((each.arm.arm.labels[axis] for each in summaries if each.is_baseline), "")
    found = {str(index): each for index, each in enumerate(_effects(axis, reference, summaries))}
    if not found:
        return None
    groups = [
        Facet(short_label(label), [name for name, each in found.items() if each.label == label])
        for label in dict.fromkeys(each.label for each in found.values())
    ]
    panels = row_panels(groups, {name: short_label(each.others) for name, each in found.items()}, [_UNIT])
    style = numbered_style(0, 0, "", "", {})
    for name, row, (axes,) in panels.rows():
        _plot_gain(axes, row, found[name].sample, style)
    said = {name: f"{each.label} with {each.others}" for name, each in found.items()}
    samples = {name: each.sample for name, each in found.items()}
    return StudyFigure(
        f"effect-{number}",
        f"Gain of each label of {axis} over {reference}, for the same labels on the other axes. {_READING}",
        f"Gain over {reference} in nats per token, with 95 % interval. {_as_text(samples, said)}",
        panels.figure,
    )


def _effects(axis: str, reference: str, summaries: Sequence[Summary]) -> Iterator[_Effect]:
    for others, group in axis_groups(summaries, axis):
        base = next((each for each in group if each.arm.arm.labels[axis] == reference), None)
        for each in group:
            common = sorted(each.losses.keys() & base.losses.keys()) if base and each is not base else []
            if base and common:
                sample = PairedSample([base.losses[seed] - each.losses[seed] for seed in common])
                yield _Effect(each.arm.arm.labels[axis], " ".join(others), sample)


def _plot_gain(axes: Axes, row: int, sample: PairedSample, style: ArmStyle) -> None:
    axes.axvline(0, color=GREY, linewidth=0.8, zorder=0)
    axes.plot(sample.differences, [row] * len(sample.differences), "|", color=style.colour, markersize=7)
    axes.plot([sample.mean], [row], **style.marked, markersize=4.5)
    if (ends := sample.interval()) is not None:
        axes.plot(ends, [row, row], color=style.colour, linewidth=1.2)


def _as_text(samples: Mapping[str, PairedSample], labels: Mapping[str, str]) -> str:
    """All gains, the largest first."""
    order = sorted(samples, key=lambda name: -samples[name].mean)
    listed = (f"{labels[name]} {with_interval(samples[name].mean, samples[name].interval(), '+.4f')}" for name in order)
    return "; ".join(listed) + "."
