"""Final loss against the numbers that a study varies."""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator
from matplotlib.transforms import ScaledTranslation, Transform

from coe_megatron.study.plan.names import text_of
from coe_megatron.study.report.comparison import Summary
from coe_megatron.study.report.figures.descriptions import ranking
from coe_megatron.study.report.figures.panels import (
    MAX_ARMS,
    Facet,
    FacetGrid,
    facet_grid,
    mean_and_half_width,
    plot_mean,
)
from coe_megatron.study.report.figures.style import (
    DOUBLE,
    LOSS_LABEL,
    SINGLE,
    ArmStyle,
    StudyFigure,
    numbered_style,
    printed,
    text_width,
    unique_labels,
)
from coe_megatron.study.report.figures.varied import Amount, Series, amounts

_KNOWN = {
    "chain.iterations": ("iterations", "C, iterations"),
    "moe.topk": ("choices", "K, experts per token and iteration"),
    "moe.num_experts": ("experts", "N, routed experts"),
    "model.num_layers": ("layers", "L, layers"),
    "model.hidden_size": ("hidden", "hidden size"),
    "moe.ffn_hidden_size": ("expert-width", "hidden size of an expert"),
    "training.steps": ("steps", "steps"),
    "parallel.world_size": ("ranks", "ranks"),
    "optimizer.lr": ("learning-rate", "learning rate"),
}
_LOG_RANGE = 3  # largest over smallest amount, from which on an axis is logarithmic
_MARGIN = 0.08  # around the data, in ranges of them
_MAX_TIED = 3  # settings in a caption


def scaling(
    summaries: Sequence[Summary], axis: str, consequences: Collection[str] = (), seen: Collection[str] = ()
) -> Iterator[StudyFigure]:
    """Final loss against each number of an axis (`varied.amounts`).

    Args:
        seen: names of figures that there are already.
    """
    known = [summary for summary in summaries if summary.mean is not None]
    for amount in amounts(known, axis, consequences) if known else ():
        if figure_name(amount.setting) not in seen and len(amount.values) > 1:
            yield _scaling_figure(amount)


def figure_name(setting: str) -> str:
    """Name of the figure of a setting."""
    return "scaling-" + (_KNOWN[setting][0] if setting in _KNOWN else re.sub(r"\W+", "-", setting))


@printed
def _scaling_figure(amount: Amount) -> StudyFigure:
    title = _KNOWN.get(amount.setting, ("", amount.setting))[1]
    labels = dict(enumerate(unique_labels([each.label for each in amount.series])))
    named = {str(number): label for number, label in labels.items()}
    styles = [numbered_style(number, number // 7, str(number), labels[number], {}) for number in labels]
    grid = _grid(list(named), named)
    for part in grid.parts:
        (axes,) = part.axes
        for name in part.names:
            at = 2.5 * (part.names.index(name) - (len(part.names) - 1) / 2)  # points, so that bars are side by side
            shifted = axes.transData + ScaledTranslation(at / 72, 0, grid.figure.dpi_scale_trans)
            _plot_series(axes, amount.series[int(name)], styles[int(name)], shifted)
        _set_amounts(axes, amount.values, grid.figure.get_figwidth())
        axes.set_ylim(*_loss_limits(amount))
        axes.set_xlabel(title)
        axes.set_ylabel(LOSS_LABEL)
    grid.finish(named)
    said = {f"{labels[number]} at {value:g}".strip(): each.mean or 0.0 for number, value, each in _points(amount)}
    return StudyFigure(
        figure_name(amount.setting),
        f"Final validation loss against {title}. Marks are means over seeds, bars their 95 % confidence intervals. "
        f"Lines join arms that differ in {'this axis of the study' if amount.tied else 'nothing else'}.{_tied(amount)}",
        f"Mean final validation loss by {title}. {ranking(said, '.4f', 'nats per token')}",
        grid.figure,
    )


def _grid(names: Sequence[str], labels: Mapping[str, str]) -> FacetGrid:
    size = math.ceil(len(names) / math.ceil(len(names) / MAX_ARMS))
    groups = [Facet("", names[start : start + size]) for start in range(0, len(names), size)]
    narrow = max(map(text_width, labels.values())) < SINGLE / 2
    return facet_grid(groups, labels, height=2.2, width=SINGLE if narrow else DOUBLE)


def _points(amount: Amount) -> Iterator[tuple[int, float, Summary]]:
    for number, series in enumerate(amount.series):
        for value, summary in series.points:
            yield number, value, summary


def _plot_series(axes: Axes, series: Series, style: ArmStyle, transform: Transform) -> None:
    line = style.dash if series.joined else ""
    axes.plot(
        [value for value, _ in series.points],
        [summary.mean or 0.0 for _, summary in series.points],
        **style.drawn | {"linestyle": line},
        transform=transform,
    )
    for value, summary in series.points:
        plot_mean(axes, value, summary.losses.values(), style, transform=transform)


def _loss_limits(amount: Amount) -> tuple[float, float]:
    """Limits that hold all intervals; matplotlib does not see those of shifted points."""
    found = [mean_and_half_width(each.losses.values()) for _, _, each in _points(amount)]
    low, high = min(mean - half for mean, half in found), max(mean + half for mean, half in found)
    margin = _MARGIN * (high - low) or 0.1
    return low - margin, high + margin


def _set_amounts(axes: Axes, values: Sequence[float], width: float) -> None:
    """A logarithmic scale for a wide range, and ticks at amounts as far as their labels have space.

    Args:
        width: of the figure, in inches.
    """
    if values[0] > 0 and values[-1] >= _LOG_RANGE * values[0]:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
        at = [math.log(value / values[0]) / math.log(values[-1] / values[0]) for value in values]
        beyond = (values[-1] / values[0]) ** _MARGIN
        axes.set_xlim(values[0] / beyond, values[-1] * beyond)
    else:
        at = [(value - values[0]) / (values[-1] - values[0]) for value in values]
        beyond = _MARGIN * (values[-1] - values[0])
        axes.set_xlim(values[0] - beyond, values[-1] + beyond)
    kept: list[int] = []
    for index, place in enumerate(at):
        space = 0.65 * width * (place - at[kept[-1]]) if kept else math.inf
        if space > text_width(f"{values[index]:g}") + 0.1:
            kept.append(index)
    axes.set_xticks([values[index] for index in kept], [f"{values[index]:,g}" for index in kept])


def _tied(amount: Amount) -> str:
    """What changes along the lines besides the amount."""
    if not amount.tied:
        return ""
    listed = [f"{key} ({', '.join(map(text_of, values))})" for key, values in list(amount.tied.items())[:_MAX_TIED]]
    more = f" and {len(amount.tied) - _MAX_TIED} more settings" if len(amount.tied) > _MAX_TIED else ""
    return f" Along them also change {', '.join(listed)}{more}."
