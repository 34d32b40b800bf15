"""The style of all figures: a colour, mark and dash for each arm, axes, legends."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coe_megatron.study.plan.names import shortened
from coe_megatron.study.report.comparison import Summary
from coe_megatron.study.report.results import Result

# Okabe and Ito's colour-blind-safe palette, without yellow, which is lost in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# Without colour, marks replace colours, and the fill of marks replaces dashes.
_MARKS, _DASHES, _FILLS = "osD^vP*", ("-", "--", ":", "-."), ("full", "none", "left", "bottom")
HATCHES = ("", "//", "..", "\\\\", "xx", "--")  # replace colours of bars
GREY = "#666666"
_MAX_LABEL = 36  # columns
LITERAL = {"parse_math": False}  # $ in a label does not start a TeX formula
MIB = 2**20
LOSS_LABEL = "validation loss (nats per token)"


@dataclass(frozen=True)
class ArmStyle:
    """The style of an arm in all figures; `label` is its title, shortened and unique."""

    name: str
    label: str
    colour: str
    mark: str
    dash: str
    fill: Any

    @property
    def marked(self) -> dict[str, Any]:
        """Arguments of matplotlib for its marks."""
        return {"color": self.colour, "marker": self.mark, "fillstyle": self.fill, "markeredgewidth": 1}

    @property
    def drawn(self) -> dict[str, Any]:
        """Arguments of matplotlib for its lines."""
        return {**self.marked, "linestyle": self.dash, "linewidth": 1.4, "markersize": 4.5, "label": self.name}


@dataclass(frozen=True)
class StudyFigure:
    """A figure and its caption.

    Attributes:
        name: name of its files.
        caption: what the figure shows, and how to read it.
    """

    name: str
    caption: str
    figure: Figure


def arm_styles(summaries: Sequence[Summary]) -> Mapping[str, ArmStyle]:
    """Styles of all arms: the first axis of labels determines colour and mark, the other axes dash and fill.

    If there are more labels than colours or dashes, cycle colours first, then dashes.
    """
    arms = [summary.arm.arm for summary in summaries]
    keys = [tuple(arm.labels.values()) for arm in arms]
    first = list(dict.fromkeys(key[0] for key in keys))
    rest = list(dict.fromkeys(key[1:] for key in keys))
    by_axis = len(first) <= len(COLOURS) and len(rest) <= len(_DASHES)
    styles = {}
    labels = _labels([arm.title for arm in arms])
    for number, (arm, key) in enumerate(zip(arms, keys, strict=True)):
        at, other = (first.index(key[0]), rest.index(key[1:])) if by_axis else (number, number // len(COLOURS))
        at, other = at % len(COLOURS), other % len(_DASHES)
        styles[arm.name] = ArmStyle(arm.name, labels[number], COLOURS[at], _MARKS[at], _DASHES[other], _FILLS[other])
    return styles


def is_truncated(title: str) -> bool:
    """Whether figures truncate a title."""
    return shortened(title, _MAX_LABEL) != title


def _labels(titles: Sequence[str]) -> list[str]:
    """Titles truncated for figures; if two become the same, the arm's number is appended."""
    short = [shortened(title, _MAX_LABEL) for title in titles]
    return [f"{each} ({number})" if short.count(each) > 1 else each for number, each in enumerate(short, 1)]


def by_arm(results: Sequence[Result]) -> Iterator[tuple[str, list[Result]]]:
    """Group results by the name of their arm."""
    for name, group in groupby(results, key=lambda result: result.run.arm):
        yield name, list(group)


def new_figure(rows: int = 1, columns: int = 1, width: float = 7.0, height: float = 4.2) -> tuple[Figure, np.ndarray]:
    """A figure with a grid of axes [rows, columns], sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def style_axes(axes: Axes) -> None:
    """Remove the frame at the top and right, and add a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)


def add_legend(figure: Figure, axes: Axes, styles: Mapping[str, ArmStyle]) -> None:
    """Add a legend below the figure, and increase the figure's height for it."""
    handles, names = axes.get_legend_handles_labels()
    labels = [styles[name].label for name in names]
    across = max(1, min(len(labels), int(figure.get_figwidth() * 12 / (max(map(len, labels)) + 5))))
    figure.set_figheight(figure.get_figheight() + 0.22 * math.ceil(len(labels) / across))
    # Pass names first, since matplotlib ignores labels that start with _.
    made = figure.legend(handles, names, loc="outside lower center", ncols=across, frameon=False, handlelength=3)
    for text, label in zip(made.get_texts(), labels, strict=True):
        text.set(text=label, **LITERAL)


def plot_with_range(axes: Axes, at: float, summary: Summary, style: ArmStyle) -> None:
    """Plot a mark at the mean over seeds, and a bar from the lowest to the highest."""
    losses, middle = list(summary.losses.values()), summary.mean or 0.0
    bar = [[middle - min(losses)], [max(losses) - middle]]
    axes.errorbar(at, middle, bar, **style.marked, linestyle="", label=style.name, capsize=3)
