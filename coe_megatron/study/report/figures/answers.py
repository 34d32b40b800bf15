"""Accuracy of final answers by group of problems, such as the number of hops."""

from collections.abc import Mapping, Sequence

from coe_megatron.study.report.figures.descriptions import ranking
from coe_megatron.study.report.figures.panels import facet_grid, facets, mean_and_half_width
from coe_megatron.study.report.figures.style import (
    DOUBLE,
    SINGLE,
    ArmStyle,
    StudyFigure,
    by_arm,
    printed,
    set_labels,
    short_label,
    text_width,
)
from coe_megatron.study.report.results import Result, group_accuracies


@printed
def answers_by_group(results: Sequence[Result], styles: Mapping[str, ArmStyle]) -> StudyFigure | None:
    """Mean accuracy of each arm in each group; None if the answers have no groups."""
    found = {name: [group_accuracies(result) for result in runs] for name, runs in by_arm(results)}
    found = {name: runs for name, runs in found.items() if any(runs)}
    names = sorted({group for runs in found.values() for run in runs for group in run})
    if not names:
        return None
    labels = {name: style.label for name, style in styles.items()}
    groups = facets(list(found), styles)
    narrow = len(groups) == 1 and max(text_width(labels[name]) for name in found) < SINGLE / 2 and len(names) < 5
    grid = facet_grid(groups, labels, height=2.2, width=SINGLE if narrow else DOUBLE)
    for part in grid.parts:
        (axes,) = part.axes
        for number, name in enumerate(part.names):
            shift = 0.5 * ((number + 0.5) / len(part.names) - 0.5)  # so that intervals are side by side
            known = [(at, values) for at, group in enumerate(names) if (values := _values(found[name], group))]
            middles, halves = zip(*(mean_and_half_width(values) for _, values in known), strict=True)
            axes.errorbar([at + shift for at, _ in known], middles, halves, **styles[name].drawn, capsize=2)
        set_labels(axes, range(len(names)), list(map(short_label, names)), grid.figure.get_figwidth())
        axes.set(ylabel="accuracy of answers", ylim=(-0.02, 1.02))
    grid.finish(labels)
    return StudyFigure(
        "answers-by-group",
        "Accuracy of final answers by group of problems, after the last step. Marks are means over seeds, bars their "
        "95 % confidence intervals.",
        " ".join(_description(found, group, labels) for group in names),
        grid.figure,
    )


def _values(runs: Sequence[Mapping[str, float]], group: str) -> list[float]:
    return [run[group] for run in runs if group in run]


def _description(found: Mapping[str, Sequence[Mapping[str, float]]], group: str, labels: Mapping[str, str]) -> str:
    means = {
        labels[name]: mean_and_half_width(values)[0] for name, runs in found.items() if (values := _values(runs, group))
    }
    return f"Accuracy in group {group}. {ranking(means, '.3f')}"
