"""What the iterations of chains do: directions of increments, and repeated choices of experts."""

from collections.abc import Mapping, Sequence
from statistics import mean

from matplotlib.axes import Axes

from coe_megatron.study.report.figures.descriptions import ranking
from coe_megatron.study.report.figures.panels import facets, mean_and_half_width, row_panels
from coe_megatron.study.report.figures.style import ArmStyle, StudyFigure, by_arm, printed
from coe_megatron.study.report.results import Result
from coe_megatron.study.report.why import IterationSummary, iteration_summaries

_QUANTITIES = {
    "cosine": "cos(F$_1$, F$_C$)",
    "single_scale": "share of a single scale (R²)",
    "overlap": "repeated experts",
}


@printed
def iterations(results: Sequence[Result], styles: Mapping[str, ArmStyle]) -> StudyFigure | None:
    """Cosine of the first and the last increment, share of a single scale, and overlap; None without any."""
    found = {name: list(filter(None, map(iteration_summaries, runs))) for name, runs in by_arm(results)}
    found = {name: runs for name, runs in found.items() if runs}
    shown = [key for key in _QUANTITIES if any(_layers(run, key) for runs in found.values() for run in runs)]
    if not shown:
        return None
    labels = {name: style.label for name, style in styles.items()}
    panels = row_panels(facets(list(found), styles), labels, [_QUANTITIES[key] for key in shown])
    for name, row, axes in panels.rows():
        for each, key in zip(axes, shown, strict=True):
            _plot_row(each, row, [layers for run in found[name] if (layers := _layers(run, key))], styles[name])
    return StudyFigure(
        "iterations",
        "What the iterations of each chain do, in the last logged step: the cosine between the first and the last "
        "increment of a token, R² of the best fit of the chain's output by one scale times the first increment, and "
        "the fraction of choices of an expert that the token has visited before. Faint dots are layers as means over "
        "seeds, marks means over layers and seeds, and bars their 95 % confidence intervals over seeds.",
        " ".join(_description(found, key, labels) for key in shown),
        panels.figure,
    )


def _layers(run: Sequence[IterationSummary], key: str) -> list[float]:
    """The values of the layers that have one."""
    return [value for each in run if (value := getattr(each, key)) is not None]


def _plot_row(axes: Axes, row: int, runs: Sequence[Sequence[float]], style: ArmStyle) -> None:
    if not runs:
        return
    layers = [mean(values) for values in zip(*runs, strict=False)]
    axes.plot(layers, [row] * len(layers), ".", color=style.colour, alpha=0.35, markersize=4)
    middle, half = mean_and_half_width(map(mean, runs))
    axes.errorbar(middle, row, None, half or None, **style.marked, linestyle="", elinewidth=0.9, capsize=2)


def _description(found: Mapping[str, Sequence[Sequence[IterationSummary]]], key: str, labels: Mapping[str, str]) -> str:
    means = {}
    for name, runs in found.items():
        if values := [mean(layers) for run in runs if (layers := _layers(run, key))]:
            means[labels[name]] = mean(values)
    titles = {"cosine": "Cosine", "single_scale": "Share of a single scale", "overlap": "Repeated experts"}
    return f"{titles[key]}. {ranking(means, '.2f')}"
