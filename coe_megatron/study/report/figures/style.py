"""The style of all figures: sizes for print, a colour, mark and dash for each arm, axes, panel letters, legends."""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from coe_megatron.study.plan.names import shortened
from coe_megatron.study.report.comparison import Summary
from coe_megatron.study.report.results import Result

SINGLE, DOUBLE = 3.35, 6.9  # widths of one and of two columns of a printed page, in inches
TEXT, SMALL = 8, 7  # sizes of text in points
ROW = 0.19  # height of a row of labels, in inches
PRINT: dict[Any, Any] = {
    "font.size": TEXT,
    "axes.titlesize": TEXT,
    "axes.labelsize": TEXT,
    "figure.titlesize": TEXT,
    "legend.fontsize": SMALL,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "axes.linewidth": 0.6,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.6,
}
printed = matplotlib.rc_context(PRINT)  # decorates the functions that make figures
# Okabe and Ito's colour-blind-safe palette, without yellow, which is lost in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# Without colour, marks replace colours, and the fill of marks replaces dashes.
_MARKS, _DASHES, _FILLS = "osD^vP*", ("-", "--", ":", "-."), ("full", "none", "left", "bottom")
HATCHES = ("", "//", "..", "\\\\", "xx", "--")  # replace colours of bars
GREY = "#666666"
_MAX_LABEL, _MAX_WIDTH = 36, 2.3  # columns; inches
_HANDLE = 0.55  # inches of a legend's line and its spaces
LITERAL: dict[str, Any] = {"parse_math": False}  # $ in a label does not start a TeX formula
MIB = 2**20
LOSS_LABEL = "validation loss (nats per token)"


@dataclass(frozen=True)
class ArmStyle:
    """The style of an arm in all figures.

    Attributes:
        name: name of the arm.
        label: its title, shortened and unique.
        labels: its label on each axis of the study.
    """

    name: str
    label: str
    labels: Mapping[str, str]
    colour: str
    mark: str
    dash: str
    fill: Any

    @property
    def marked(self) -> dict[str, Any]:
        """Arguments of matplotlib for its marks."""
        return {"color": self.colour, "marker": self.mark, "fillstyle": self.fill, "markeredgewidth": 0.8}

    @property
    def drawn(self) -> dict[str, Any]:
        """Arguments of matplotlib for its lines."""
        return {**self.marked, "linestyle": self.dash, "linewidth": 1.1, "markersize": 3.5, "label": self.name}


@dataclass(frozen=True)
class StudyFigure:
    """A figure and its texts.

    Attributes:
        name: name of its files.
        caption: what the figure shows, and how to read it.
        alt: what its data say, with numbers, for readers who do not see it.
    """

    name: str
    caption: str
    alt: str
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
    labels = unique_labels([arm.title for arm in arms])
    for number, (arm, key) in enumerate(zip(arms, keys, strict=True)):
        at, other = (first.index(key[0]), rest.index(key[1:])) if by_axis else (number, number // len(COLOURS))
        styles[arm.name] = numbered_style(at, other, arm.name, labels[number], arm.labels)
    return styles


def numbered_style(at: int, other: int, name: str, label: str, labels: Mapping[str, str]) -> ArmStyle:
    """The style with a number for colour and mark, and another for dash and fill; both start again at their ends."""
    at, other = at % len(COLOURS), other % len(_DASHES)
    return ArmStyle(name, label, labels, COLOURS[at], _MARKS[at], _DASHES[other], _FILLS[other])


def is_truncated(title: str) -> bool:
    """Whether figures truncate a title."""
    return short_label(title) != title


def short_label(title: str) -> str:
    """A title truncated to the columns and the width that figures have for it."""
    columns, label = _MAX_LABEL, shortened(title, _MAX_LABEL)
    while text_width(label) > _MAX_WIDTH:
        columns -= 1
        label = shortened(title, columns)
    return label


def text_width(text: str) -> float:
    """Width of small text in inches."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        return text_to_path.get_text_width_height_descent(text, FontProperties(size=SMALL), False)[0] / 72


def unique_labels(titles: Sequence[str]) -> list[str]:
    """Titles truncated for figures; if two become the same, the number of the arm is appended."""
    short = [short_label(title) for title in titles]
    return [f"{each} ({number})" if short.count(each) > 1 else each for number, each in enumerate(short, 1)]


def by_arm(results: Sequence[Result]) -> Iterator[tuple[str, list[Result]]]:
    """Group results by the name of their arm."""
    for name, group in groupby(results, key=lambda result: result.run.arm):
        yield name, list(group)


def style_axes(axes: Axes) -> None:
    """Remove the frame at the top and right, and add a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=SMALL, width=0.6, length=2.5)


def set_labels(axes: Axes, places: Sequence[float], labels: Sequence[str], width: float) -> None:
    """Label places of the horizontal axis, upright if the labels would be too wide side by side.

    Args:
        width: of the figure, in inches.
    """
    at = np.sort(axes.xaxis.get_transform().transform(np.array(places, dtype=float)))
    closest = float(np.diff(at).min() / np.ptp(at)) if len(at) > 1 else 1.0
    crowded = 0.65 * width * closest < max(map(text_width, labels)) + 0.1
    axes.set_xticks(places, labels, rotation=90 * crowded, **LITERAL)


def add_letters(panels: Sequence[Axes]) -> None:
    """Put (a), (b), ... before the titles of several panels."""
    if len(panels) > 1:
        for number, axes in enumerate(panels):
            title = f"({_letter(number)}) {axes.get_title(loc='left')}".strip()
            axes.set_title(title, loc="left", fontsize=TEXT, **LITERAL)


def _letter(number: int) -> str:
    """a to z, then aa, ab, ..."""
    return (chr(96 + number // 26) if number >= 26 else "") + chr(97 + number % 26)


def legend_rows(labels: Iterable[str], width: float) -> tuple[int, int]:
    """Columns and rows of a legend of that width in inches; no rows if nothing has a name."""
    labels = list(labels)
    if not any(labels):
        return 1, 0
    columns = max(1, min(len(labels), int(width / (max(map(text_width, labels)) + _HANDLE))))
    return columns, math.ceil(len(labels) / columns)


def add_legend(figure: FigureBase, axes: Axes, labels: Mapping[str, str], width: float) -> None:
    """Add a legend below a figure, or a part of it with that width; `labels` has what to call each line's name."""
    handles, names = axes.get_legend_handles_labels()
    shown = [labels[name] for name in names]
    columns, _ = legend_rows(shown, width)
    # Pass names first, since matplotlib ignores labels that start with _.
    made = figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handlelength=2.8,
        columnspacing=1,
        fontsize=SMALL,
    )
    for text, label in zip(made.get_texts(), shown, strict=True):
        text.set(text=label, **LITERAL)
