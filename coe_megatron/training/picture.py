"""The picture of a run: training and validation loss against tokens seen."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#666666"  # apart for colour-blind readers and in print
_DASHES = ("--", ":", "-.")  # of single validation sets, in the colour of all


def draw_loss(lines: Sequence[Mapping[str, Any]], entropy: float, title: str, path: Path) -> Path:
    """Draw what metrics.jsonl holds.

    Args:
        lines: its objects; losses that are null are left out.
        entropy: entropy in nats of the token frequencies, drawn as the line to get below.
        title: what was trained.
        path: the PNG to write; returned.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    curves: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("train_loss", "training (one step)", {"color": _BLUE, "alpha": 0.6, "linewidth": 1}),
        ("valid_loss", "validation", {"color": _ORANGE, "marker": "o", "markersize": 4, "linewidth": 2}),
    )
    for key, label, style in curves:
        points = [(line["tokens"], line[key]) for line in lines if line.get(key) is not None]
        _curve(axes, points, label, **style)
    sets = next((line["valid"] for line in reversed(lines) if "valid" in line), ())
    for name, dashes in zip(sets, cycle(_DASHES), strict=False):
        of_set = [(line["tokens"], line["valid"][name]["loss"]) for line in lines if "valid" in line]
        points = [(tokens, loss) for tokens, loss in of_set if loss is not None]
        _curve(axes, points, f"validation: {name}", color=_ORANGE, linestyle=dashes)
    axes.axhline(entropy, color=_GREY, linestyle="--", linewidth=1, label="entropy of token frequencies")
    axes.set(xlabel="tokens seen (padding not counted)", ylabel="loss [nats per token]", title=title)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return path


def _curve(axes: Axes, points: Sequence[tuple[float, float]], label: str, **style: Any) -> None:
    """A curve through (tokens, loss), with its last loss in the legend."""
    if points:
        axes.plot(*zip(*points, strict=True), label=f"{label}, {points[-1][1]:.3f} at the end", **style)
