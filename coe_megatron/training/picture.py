"""The picture of a run: training and validation loss against tokens seen."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#666666"  # apart for colour-blind readers and in print


def draw_loss(lines: Sequence[Mapping[str, Any]], entropy: float, title: str, path: Path) -> Path:
    """Draw what metrics.jsonl holds.

    Args:
        lines: its objects.
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
        points = [(line["tokens"], line[key]) for line in lines if key in line]
        axes.plot([tokens for tokens, _ in points], [loss for _, loss in points], label=label, **style)
    axes.axhline(entropy, color=_GREY, linestyle="--", linewidth=1, label="entropy of token frequencies")
    last = next(line for line in reversed(lines) if "valid_loss" in line)
    axes.annotate(
        f"{last['valid_loss']:.3f}",
        (last["tokens"], last["valid_loss"]),
        textcoords="offset points",
        xytext=(-4, 8),
        ha="right",
        color=_ORANGE,
    )
    axes.set(xlabel="tokens seen (padding not counted)", ylabel="loss [nats per token]", title=title)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return path
