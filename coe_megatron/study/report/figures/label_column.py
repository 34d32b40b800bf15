"""Names of marks in a column beside the axes, each at the height of its mark as far as there is space.

Unlike names beside the marks, they never overlap with each other or with data.
"""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from coe_megatron.study.report.figures.style import GREY, LITERAL, SMALL, ArmStyle

_LINE = 0.14  # inches between names
_START = 1.05  # of the column, in widths of the axes


def label_column(
    axes: Axes, points: Mapping[str, tuple[float, float]], styles: Mapping[str, ArmStyle], height: float
) -> None:
    """Name marks in a column right of the axes, with a thin line from each; the limits of the axes are then fixed.

    Args:
        points: x and y of each arm, by name.
        height: that the axes have at least, in inches; 0.14 for each arm.
    """
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    axes.set(xlim=(left, right), ylim=(low, high))
    names = sorted(points, key=lambda name: (points[name][1], points[name][0]))
    wanted = [(points[name][1] - low) / (high - low) for name in names]
    for name, place in zip(names, spread(wanted, _LINE / height), strict=True):
        style, end = styles[name], (_START, place)
        axes.plot(*([each] for each in end), transform=axes.transAxes, clip_on=False, **style.marked, markersize=4.5)
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.4, "alpha": 0.6, "shrinkA": 3, "shrinkB": 3}
        axes.annotate("", points[name], end, "data", "axes fraction", arrowprops=line, annotation_clip=False)
        text = axes.text(_START, place, f"   {style.label}", transform=axes.transAxes, va="center", **LITERAL)
        text.set_fontsize(SMALL)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places between 0 and 1, moved as little as needed to be at least a gap apart.

    Args:
        gap: at most 1 / (len(places) - 1).
    """
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + gap if found else 0.0))
    limit = 1.0
    for index in range(len(found) - 1, -1, -1):
        found[index] = limit = min(found[index], limit)
        limit -= gap
    return found
