"""Figures of several panels: facets of at most eight arms each, rows of arms, means with intervals."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from scipy import stats

from coe_megatron.study.report.figures.style import (
    DOUBLE,
    LITERAL,
    ROW,
    SINGLE,
    TEXT,
    ArmStyle,
    add_legend,
    add_letters,
    legend_rows,
    short_label,
    style_axes,
    text_width,
)
from coe_megatron.study.report.statistics import LEVEL

MAX_ARMS = 8  # in a facet
_LEGEND_ROW, _TITLE = 0.17, 0.22  # heights in inches


@dataclass(frozen=True)
class Facet:
    """The arms of one part of a figure; the title is empty if it is the only one."""

    title: str
    names: Sequence[str]


def facets(names: Sequence[str], styles: Mapping[str, ArmStyle]) -> list[Facet]:
    """Arms in groups of at most `MAX_ARMS`: by their label on one axis if that needs few groups, otherwise in order."""
    if len(names) <= MAX_ARMS:
        return [Facet("", names)]
    needed = math.ceil(len(names) / MAX_ARMS)
    for axis in styles[names[0]].labels:
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(styles[name].labels[axis], []).append(name)
        if max(map(len, groups.values())) <= MAX_ARMS and len(groups) <= 2 * needed:
            return [Facet(short_label(label), group) for label, group in groups.items()]
    size = math.ceil(len(names) / needed)
    parts = [names[start : start + size] for start in range(0, len(names), size)]
    return [
        Facet(f"arms {number * size + 1} to {number * size + len(part)}", part) for number, part in enumerate(parts)
    ]


@dataclass(frozen=True)
class FacetPanels:
    """One facet of a figure: its arms, its part of the figure, and its axes."""

    names: Sequence[str]
    part: SubFigure
    axes: Sequence[Axes]


@dataclass(frozen=True)
class FacetGrid:
    """A figure with a part for each facet; the axes of each part have the same meaning, in order."""

    figure: Figure
    parts: list[FacetPanels]

    def finish(self, labels: Mapping[str, str]) -> None:
        """Add letters, give all parts the same limits, and put a legend below each that has names.

        Args:
            labels: what to call the name of each line.
        """
        add_letters([axes for part in self.parts for axes in part.axes])
        for same in zip(*(part.axes for part in self.parts), strict=True):
            _share_limits(same)
        for part in self.parts:
            if any(labels[name] for name in part.names):
                add_legend(part.part, part.axes[0], labels, self.figure.get_figwidth())


def _share_limits(panels: Sequence[Axes]) -> None:
    """Give axes the smallest limits that hold those of all that have data."""
    drawn = [axes for axes in panels if np.isfinite(axes.dataLim.get_points()).all()] if len(panels) > 1 else []
    for axes in panels if drawn else ():
        axes.set_xlim(min(each.get_xlim()[0] for each in drawn), max(each.get_xlim()[1] for each in drawn))
        axes.set_ylim(min(each.get_ylim()[0] for each in drawn), max(each.get_ylim()[1] for each in drawn))


def facet_grid(
    groups: Sequence[Facet], labels: Mapping[str, str], panels: int = 1, height: float = 1.75, width: float = DOUBLE
) -> FacetGrid:
    """A figure with a part for each facet, below each other, and a legend below each.

    Args:
        labels: what the legends will call each arm, by name.
        panels: axes of each part.
        height: of axes with their labels, in inches.
    """
    rows = 2 if panels == 4 and len(groups) == 1 else 1
    heights = [
        rows * height
        + _TITLE * bool(group.title and panels > 1)
        + _LEGEND_ROW * legend_rows([labels[name] for name in group.names], width)[1]
        for group in groups
    ]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    made = []
    for group, part in zip(groups, parts, strict=True):
        axes = list(part.subplots(rows, panels // rows, squeeze=False).flat)
        if panels == 1:
            axes[0].set_title(group.title, loc="left", fontsize=TEXT, **LITERAL)
        elif group.title:
            part.suptitle(group.title, x=0.01, ha="left", fontsize=TEXT, fontweight="bold", **LITERAL)
        for each in axes:
            style_axes(each)
        made.append(FacetPanels(group.names, part, axes))
    return FacetGrid(figure, made)


@dataclass(frozen=True)
class RowPanels:
    """A figure with a row for each arm: `parts` has the arms of each facet and its axes, one for each quantity."""

    figure: Figure
    parts: list[tuple[Sequence[str], Sequence[Axes]]]

    def rows(self) -> Iterator[tuple[str, int, Sequence[Axes]]]:
        """Every arm, the height at which it is drawn, and the axes."""
        for names, axes in self.parts:
            for row, name in enumerate(names):
                yield name, row, axes


def row_panels(groups: Sequence[Facet], labels: Mapping[str, str], titles: Sequence[str]) -> RowPanels:
    """A figure whose rows are arms.

    Args:
        labels: what to call each row, by name.
        titles: of the quantities, one for each column of panels.
    """
    widest = max(text_width(labels[name]) for group in groups for name in group.names)
    sizes = [len(group.names) + 1.5 * bool(group.title or len(titles) > 1) for group in groups]
    figure = Figure(
        figsize=(SINGLE if len(titles) == 1 and widest < SINGLE / 2.5 else DOUBLE, ROW * sum(sizes) + 0.6),
        layout="constrained",
    )
    grid = figure.subplots(
        len(groups),
        len(titles),
        squeeze=False,
        sharex="col",
        sharey="row",
        height_ratios=[len(group.names) for group in groups],
    )
    for group, row in zip(groups, grid, strict=True):
        for axes in row:
            style_axes(axes)
            axes.set_ylim(len(group.names) - 0.5, -0.5)
        row[0].set_yticks(range(len(group.names)), [labels[name] for name in group.names], **LITERAL)
        if len(titles) == 1:  # otherwise it would run into the next panel's
            row[0].set_title(group.title, loc="left", fontsize=TEXT, **LITERAL)
    for axes, title in zip(grid[-1], titles, strict=True):
        axes.set_xlabel(title)
    add_letters(list(grid.flat))
    return RowPanels(figure, [(group.names, list(row)) for group, row in zip(groups, grid, strict=True)])


def half_widths(values: np.ndarray) -> np.ndarray:
    """Half of the 95 % confidence interval of the mean over the first dimension, by Student's t; nan with one value.

    Args:
        values: float64 [seeds, ...].
    """
    count = len(values)
    if count < 2:
        return np.full(values.shape[1:], math.nan)
    return stats.t.ppf(1 - LEVEL / 2, count - 1) * values.std(0, ddof=1) / math.sqrt(count)


def mean_and_half_width(values: Iterable[float]) -> tuple[float, float]:
    """The mean of values of one quantity, and half of its 95 % interval; 0 with one value."""
    array = np.array(list(values), dtype=float)
    return float(array.mean()), float(np.nan_to_num(half_widths(array)))


def plot_mean(axes: Axes, at: float, values: Iterable[float], style: ArmStyle, **more: Any) -> None:
    """Plot a mark at the mean, and its 95 % interval as a bar."""
    middle, half = mean_and_half_width(values)
    axes.errorbar(at, middle, half or None, **style.marked, linestyle="", elinewidth=0.8, capsize=2, **more)


def plot_band(axes: Axes, at: np.ndarray, values: np.ndarray, style: ArmStyle, geometric: bool = False) -> None:
    """Plot a line through means over seeds, and their 95 % intervals as a band.

    Args:
        at: float64 [points].
        values: float64 [seeds, points]; nan where there is none.
        geometric: take means and intervals of logarithms, for an axis with a logarithmic scale.
    """
    values = np.log(values) if geometric else values
    middle, half = values.mean(0), half_widths(values)
    low, line, high = (np.exp(each) if geometric else each for each in (middle - half, middle, middle + half))
    axes.plot(at, line, **style.drawn, markevery=max(1, math.ceil(len(at) / 8)))
    axes.fill_between(at, low, high, color=style.colour, alpha=0.15, linewidth=0)
