"""Routing: over training, expert loads, norms of the chain state, consecutive experts."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from coe_megatron.study.report.figures.curves import common_steps
from coe_megatron.study.report.figures.descriptions import ranking
from coe_megatron.study.report.figures.panels import facet_grid, facets, plot_band
from coe_megatron.study.report.figures.style import (
    DOUBLE,
    LITERAL,
    SMALL,
    TEXT,
    ArmStyle,
    StudyFigure,
    add_letters,
    by_arm,
    printed,
)
from coe_megatron.study.report.results import Result

_T = TypeVar("_T")
_MAX_PAIRS = 4  # matrices of consecutive experts per arm
_MAX_TICKS = 8  # labels of rows without overlap
_LOADS, _FOLLOWERS = 12, 5  # arms in a figure that fits a page
_OVER_TIME = {
    "routing_entropy": "entropy / log N",
    "routing_load_max_over_mean": "busiest expert / mean",
    "routing_dead_experts": "dead experts",
    "routing_overlap": "retention",
}


@printed
def routing_over_time(results: Sequence[Result], styles: Mapping[str, ArmStyle]) -> StudyFigure:
    """Routing statistics over training."""
    runs, labels = dict(by_arm(results)), {name: style.label for name, style in styles.items()}
    grid = facet_grid(facets(list(runs), styles), labels, len(_OVER_TIME), height=1.6)
    for part in grid.parts:
        for axes, (key, title) in zip(part.axes, _OVER_TIME.items(), strict=True):
            for name in part.names:
                steps, values = _over_time(runs[name], key)
                plot_band(axes, steps, values, styles[name])
            axes.set_title(title, loc="left")
            axes.set_xlabel("steps")
            axes.xaxis.set_major_locator(MaxNLocator(4))
    grid.finish(labels)
    entropy = {labels[name]: float(_over_time(own, "routing_entropy")[1][:, -1].mean()) for name, own in runs.items()}
    return StudyFigure(
        "routing",
        "Routing over training, as means over layers and iterations: entropy of the router's scores relative to that "
        "of a uniform choice, tokens of the busiest expert relative to the mean, experts without tokens, and "
        "retention, the fraction of choices of an expert that the token has already visited in an earlier iteration of "
        "the layer. Lines are means over seeds, bands their 95 % confidence intervals.",
        f"Entropy over log N at the end. {ranking(entropy, '.3f')}",
        grid.figure,
    )


def _over_time(runs: Sequence[Result], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [points], and values [seeds, points] at steps at which all seeds have one; a single nan without any."""
    lines = common_steps([[line for line in run.steps if line.get(key) is not None] for run in runs])
    if not lines[0]:
        return np.array([math.nan]), np.full((len(runs), 1), math.nan)
    unit = math.log(runs[0].run.config.moe.num_experts) if key == "routing_entropy" else 1.0
    values = np.array([[line[key] / unit for line in some] for some in lines], dtype=float)
    return np.array([line["step"] for line in lines[0]], dtype=float), values


def loads(results: Sequence[Result], styles: Mapping[str, ArmStyle]) -> Iterator[StudyFigure]:
    """Expert load by layer and iteration; several figures if there are more arms than fit a page."""
    for suffix, arms in _pages(list(by_arm(results)), _LOADS):
        yield _loads(suffix, {name: runs[0].steps[-1]["routing"] for name, runs in arms}, styles)


@printed
def _loads(suffix: str, arms: Mapping[str, Sequence[Any]], styles: Mapping[str, ArmStyle]) -> StudyFigure:
    rows = math.ceil(len(arms) / 2)
    figure = Figure(figsize=(DOUBLE, 0.4 + 1.4 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False)
    load = {name: np.array([_relative_load(part) for part in parts]) for name, parts in arms.items()}
    top = max(each.max() for each in load.values())
    for axes, (name, parts) in zip(grid.flat, arms.items(), strict=False):
        image = axes.imshow(load[name], aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
        ticks = range(0, len(parts), math.ceil(len(parts) / _MAX_TICKS))
        axes.set_yticks(ticks, [f"{parts[row]['layer']}.{parts[row]['iteration']}" for row in ticks])
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_title(styles[name].label, loc="left", fontsize=TEXT, **LITERAL)
    for axes in grid.flat[len(arms) :]:
        axes.set_visible(False)
    add_letters(list(grid.flat[: len(arms)]))
    figure.supxlabel("experts, busiest first", fontsize=TEXT)
    figure.supylabel("layer.iteration", fontsize=TEXT)
    figure.colorbar(image, ax=grid, shrink=0.8, aspect=12 * rows, label="load / mean load")
    busiest = {styles[name].label: float(each.max()) for name, each in load.items()}
    return StudyFigure(
        f"load{suffix}",
        "Expert load by layer and iteration, in the last step of each arm's first finished seed; 1 is perfect balance.",
        f"Load of the busiest expert over the mean load, in any layer and iteration. {ranking(busiest, '.2f')}",
        figure,
    )


def _relative_load(part: Mapping[str, Any]) -> list[float]:
    """Load over mean load, in descending order."""
    return sorted((fraction * len(part["load"]) for fraction in part["load"]), reverse=True)


@printed
def norms(results: Sequence[Result], styles: Mapping[str, ArmStyle]) -> StudyFigure:
    """Norm of the chain state, and of its increments."""
    runs, labels = dict(by_arm(results)), {name: style.label for name, style in styles.items()}
    shown = {"state_norm": "norm of the state x(t)", "increment_over_state": "increment over state"}
    grid = facet_grid(facets(list(runs), styles), labels, len(shown), height=1.9)
    for part in grid.parts:
        for axes, (key, title) in zip(part.axes, shown.items(), strict=True):
            for name in part.names:
                plot_band(axes, *_by_place(runs[name], key), styles[name], geometric=True)
            axes.set_title(title, loc="left")
            axes.set_xlabel("layer (iterations in between)")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            _set_scale(axes, np.concatenate([_by_place(own, key)[1].ravel() for own in runs.values()]))
    grid.finish(labels)
    last = {labels[name]: float(_by_place(own, "state_norm")[1][:, -1].mean()) for name, own in runs.items()}
    return StudyFigure(
        "norms",
        "Root mean square of the chain state after each iteration, and of the experts' increment relative to their "
        "input, in the last step. Lines are geometric means over seeds, bands their 95 % confidence intervals.",
        f"Norm of the state after the last layer. {ranking(last, '.3g')}",
        grid.figure,
    )


def _set_scale(axes: Axes, values: np.ndarray) -> None:
    """A logarithmic scale if values are far apart, so that a diverging chain does not hide the others."""
    if np.nanmax(values, initial=0.0) > 10 * np.nanmin(values, initial=math.inf):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _by_place(runs: Sequence[Result], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Places of layers and iterations [places], and values [seeds, places]; not positive ones are nan."""
    parts = runs[0].steps[-1]["routing"]
    iterations = max(part["iteration"] for part in parts)
    at = np.array([part["layer"] + (part["iteration"] - 1) / iterations for part in parts])
    values = np.array([[part[key] for part in run.steps[-1]["routing"]] for run in runs], dtype=float)
    return at, np.where(values > 0, values, math.nan)


def expert_pairs(result: Result) -> list[Mapping[str, Any]]:
    """The entries with counts of consecutive experts."""
    return [part for part in result.steps[-1]["routing"] if part.get("pairs")]


def followers(results: Sequence[Result], styles: Mapping[str, ArmStyle]) -> Iterator[StudyFigure]:
    """Which experts follow which in consecutive iterations; several figures if there are more arms than fit a page."""
    arms = [(name, expert_pairs(runs[0])) for name, runs in by_arm(results)]
    for suffix, part in _pages([(name, pairs) for name, pairs in arms if pairs], _FOLLOWERS):
        yield _followers(suffix, {name: _evenly_spaced(pairs, _MAX_PAIRS) for name, pairs in part}, styles)


@printed
def _followers(suffix: str, arms: Mapping[str, Sequence[Any]], styles: Mapping[str, ArmStyle]) -> StudyFigure:
    figure = Figure(figsize=(DOUBLE, 0.2 + 1.65 * len(arms)), layout="constrained")
    grid = figure.subplots(len(arms), _MAX_PAIRS, squeeze=False)
    for number, (row, (name, parts)) in enumerate(zip(grid, arms.items(), strict=True)):
        for axes in row:
            axes.set(xticks=[], yticks=[])
            axes.set_visible(False)
        for axes, part in zip(row, parts, strict=False):
            axes.set_visible(True)
            image = axes.imshow(_lift(part["pairs"]), cmap="cividis", vmin=-3, vmax=3, interpolation="nearest")
            axes.set_xlabel(f"layer {part['layer']}, iteration {part['iteration']}", fontsize=SMALL)
        letter = f"({chr(97 + number)}) " if len(arms) > 1 else ""
        row[0].set_title(f"{letter}{styles[name].label}", loc="left", fontsize=TEXT, **LITERAL)
    bar = figure.colorbar(image, ax=grid, shrink=0.8, aspect=12 * len(arms))
    bar.set_label("log2 of observed / expected")
    stays = {styles[name].label: _mean_diagonal(parts) for name, parts in arms.items()}
    return StudyFigure(
        f"followers{suffix}",
        "Experts of consecutive iterations. Rows are experts of the previous iteration, columns those of the named "
        "iteration. Light pairs share more tokens than expected by chance, dark pairs fewer. A light diagonal means "
        f"that tokens stay at their expert. Each arm has up to {_MAX_PAIRS} evenly spaced matrices, in the last step "
        "of its first finished seed.",
        "Mean log2 of observed over expected tokens of pairs of an expert with itself; above 0, tokens stay. "
        f"{ranking(stays, '+.2f')}",
        figure,
    )


def _pages(arms: Sequence[_T], size: int) -> Iterator[tuple[str, Sequence[_T]]]:
    """Parts of at most `size` arms, with what the names of their figures end with."""
    for start in range(0, len(arms), size):
        yield f"-{start // size + 1}" if start else "", arms[start : start + size]


def _evenly_spaced(parts: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit` of the parts, evenly spaced from the first to the last."""
    return [parts[round(at)] for at in np.linspace(0, len(parts) - 1, min(limit, len(parts)))]


def _mean_diagonal(parts: Sequence[Any]) -> float:
    return float(np.mean([np.diagonal(_lift(part["pairs"])).mean() for part in parts]))


def _lift(pairs: Sequence[Sequence[int]]) -> np.ndarray:
    """log2 of observed over expected counts if iterations chose independently; 0 without tokens."""
    counts = np.array(pairs, dtype=float)
    chance = np.outer(counts.sum(1), counts.sum(0)) / max(counts.sum(), 1.0)
    return np.log2(np.divide(counts + 0.5, chance + 0.5))
