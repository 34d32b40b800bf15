"""Routing: over training, expert loads, norms of the chain state, consecutive experts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from coe_megatron.study.report.figures.style import (
    LITERAL,
    ArmStyle,
    StudyFigure,
    add_legend,
    by_arm,
    new_figure,
    style_axes,
)
from coe_megatron.study.report.results import Result

_MAX_PAIRS = 4  # matrices of consecutive experts per arm
_MAX_TICKS = 12  # labels of rows without overlap


def routing_over_time(results: Sequence[Result], styles: Mapping[str, ArmStyle]) -> StudyFigure:
    """Routing statistics over training."""
    shown = {
        "routing_entropy": "router entropy / log N",
        "routing_load_max_over_mean": "busiest expert / mean load",
        "routing_dead_experts": "dead experts (no tokens)",
        "routing_overlap": "retention: fraction of repeated experts",
    }
    figure, grid = new_figure(2, 2, height=6.2)
    for axes, (key, title) in zip(grid.flat, shown.items(), strict=True):
        style_axes(axes)
        for name, runs in by_arm(results):
            first, style = runs[0], styles[name]
            lines = [line for line in first.steps if line.get(key) is not None]
            unit = math.log(first.run.config.moe.num_experts) if key == "routing_entropy" else 1.0
            values = [line[key] / unit for line in lines]
            steps = [line["step"] for line in lines]
            axes.plot(steps, values, **style.drawn, markevery=max(1, len(steps) // 6))
        axes.set_title(title, fontsize="medium", loc="left")
    for axes in grid[1]:
        axes.set_xlabel("steps")
    add_legend(figure, grid[0, 0], styles)
    return StudyFigure(
        "routing",
        "Routing over training, as means over layers and iterations, for each arm's first finished seed. Retention is "
        "the fraction of choices of an expert that the token has already visited in an earlier iteration of the layer.",
        figure,
    )


def loads(results: Sequence[Result], styles: Mapping[str, ArmStyle]) -> StudyFigure:
    """Expert load by layer and iteration."""
    arms = [(name, runs[0].steps[-1]["routing"]) for name, runs in by_arm(results)]
    columns = min(3, len(arms))
    rows = math.ceil(len(arms) / columns)
    figure, grid = new_figure(rows, columns, width=3.0 * columns + 1, height=0.6 + 2.4 * rows)
    top = max(max(part["load"]) * len(part["load"]) for _, parts in arms for part in parts)
    for axes, (name, parts) in zip(grid.flat, arms, strict=False):
        load = np.array(
            [sorted((fraction * len(part["load"]) for fraction in part["load"]), reverse=True) for part in parts]
        )
        image = axes.imshow(load, aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
        ticks = range(0, len(parts), math.ceil(len(parts) / _MAX_TICKS))
        axes.set_yticks(ticks, [f"{parts[row]['layer']}.{parts[row]['iteration']}" for row in ticks], fontsize=7)
        axes.set_title(styles[name].label, fontsize="small", loc="left", **LITERAL)
        axes.set_xlabel("experts, busiest first")
    for axes in grid.flat[len(arms) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("layer.iteration")
    figure.colorbar(image, ax=grid, shrink=0.8, aspect=20 * rows, label="load / mean load")
    return StudyFigure(
        "load",
        "Expert load by layer and iteration, in the last step of each arm's first finished seed; 1 is perfect balance.",
        figure,
    )


def norms(results: Sequence[Result], styles: Mapping[str, ArmStyle]) -> StudyFigure:
    """Norm of the chain state, and of its increments."""
    figure, grid = new_figure(1, 2, height=3.8)
    for axes, key, title in (
        (grid[0, 0], "state_norm", "norm of the state x(t)"),
        (grid[0, 1], "increment_over_state", "increment over state"),
    ):
        style_axes(axes)
        for name, runs in by_arm(results):
            parts, style = runs[0].steps[-1]["routing"], styles[name]
            iterations = max(part["iteration"] for part in parts)
            at = [part["layer"] + (part["iteration"] - 1) / iterations for part in parts]
            axes.plot(at, [part[key] for part in parts], **style.drawn)
        axes.set_title(title, fontsize="medium", loc="left")
        axes.set_xlabel("layer (iterations in between)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_yscale("log")  # so that a diverging chain does not hide the others
    add_legend(figure, grid[0, 0], styles)
    return StudyFigure(
        "norms",
        "Root mean square of the chain state after each iteration, and of the experts' increment relative to their "
        "input, in the last step of each arm's first finished seed.",
        figure,
    )


def expert_pairs(result: Result) -> list[Mapping[str, Any]]:
    """The entries with counts of consecutive experts."""
    return [part for part in result.steps[-1]["routing"] if part.get("pairs")]


def followers(results: Sequence[Result], styles: Mapping[str, ArmStyle]) -> StudyFigure:
    """Which experts follow which in consecutive iterations."""
    arms = [(name, _evenly_spaced(expert_pairs(runs[0]), _MAX_PAIRS)) for name, runs in by_arm(results)]
    columns = max(len(parts) for _, parts in arms)
    figure, grid = new_figure(len(arms), columns, width=1.0 + 1.9 * columns, height=0.6 + 2.0 * len(arms))
    for row, (name, parts) in zip(grid, arms, strict=True):
        for axes, part in zip(row, parts, strict=False):
            image = axes.imshow(_lift(part["pairs"]), cmap="cividis", vmin=-3, vmax=3, interpolation="nearest")
            axes.set_title(f"layer {part['layer']}, iteration {part['iteration']}", fontsize="x-small")
        for axes in row[len(parts) :]:
            axes.set_visible(False)
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(styles[name].label, fontsize="x-small", **LITERAL)
    bar = figure.colorbar(image, ax=grid, shrink=0.8, aspect=20 * len(arms))
    bar.set_label("log2 of observed / expected", fontsize="small")
    return StudyFigure(
        "followers",
        "Experts of consecutive iterations. Rows are experts of the previous iteration, columns those of the named "
        "iteration. Light pairs share more tokens than expected by chance, dark pairs fewer. A light diagonal means "
        f"that tokens stay at their expert. Each arm has up to {_MAX_PAIRS} evenly spaced matrices, in the last step "
        "of its first finished seed.",
        figure,
    )


def _evenly_spaced(parts: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit` of the parts, evenly spaced from the first to the last."""
    return [parts[round(at)] for at in np.linspace(0, len(parts) - 1, min(limit, len(parts)))]


def _lift(pairs: Sequence[Sequence[int]]) -> np.ndarray:
    """log2 of observed over expected counts if iterations chose independently; 0 without tokens."""
    counts = np.array(pairs, dtype=float)
    chance = np.outer(counts.sum(1), counts.sum(0)) / max(counts.sum(), 1.0)
    return np.log2(np.divide(counts + 0.5, chance + 0.5))
