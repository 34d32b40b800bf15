"""Draws docs/chain-vs-moe.png, the picture of the README, from the committed report of the study main-pair.

    python docs/chain_vs_moe.py

Final losses are those of results.csv. The losses on the way are the vertices of the report's loss-curves.svg. Their
scale is fitted to the final losses, and the script fails if any of these is off by more than a thousandth of a nat.
"""

import csv
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import ttest_rel

HERE = Path(__file__).parent
REPORT = HERE / "studies" / "main-pair"
COLOURS = {"MoE(8/64)": "#0072B2", "CoE-2(4/64)": "#D55E00"}
PANELS = {"prenorm": "prenorm, as in Megatron-Core", "reference": "reference, as in the paper's code"}
FLOPS_PANEL = "3"  # of the four in loss-curves.svg


@dataclass(frozen=True)
class Curve:
    """Validation loss of one arm against training FLOPs; one entry for each evaluation, over the seeds."""

    flops: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def final_losses() -> tuple[dict[tuple[str, str], list[float]], dict[tuple[str, str], float]]:
    """For each arm, a pair of design and norm placement: its final losses by seed, and its training FLOPs."""
    losses, flops = defaultdict(list), {}
    with (REPORT / "results.csv").open() as file:
        for row in csv.DictReader(file):
            arm = tuple(label for name, label in row.items() if name.startswith("axis_"))
            losses[arm].append(float(row["valid_loss"]))
            flops[arm] = float(row["flops"])
    return losses, flops


def curves() -> dict[tuple[str, str], Curve]:
    """All arms, in the order of the report."""
    losses, flops = final_losses()
    parts = re.split(r'<g id="axes_(\d)">', (REPORT / "loss-curves.svg").read_text())
    panel = dict(zip(parts[1::2], parts[2::2], strict=True))[FLOPS_PANEL]
    bands = [
        _points(path) for path in re.findall(r'<g id="FillBetween\w+">.*?<path[^>]* d="([^"]*)"', panel, re.DOTALL)
    ]
    lines = [_points(path) for path in re.findall(r'<path d="([^"]*)"[^>]*stroke-width: 1.4', panel)]
    assert len(bands) == len(lines) == len(losses)
    slope, offset = np.polyfit([line[-1, 1] for line in lines], [np.mean(seeds) for seeds in losses.values()], 1)
    found = {}
    for (arm, seeds), band, line in zip(losses.items(), bands, lines, strict=True):
        count = len(band) // 2 - 1  # evaluations, the first of them before training and outside the figure
        low, high = band[1 : count + 1] @ [0, slope] + offset, band[-count:][::-1] @ [0, slope] + offset
        at = band[1 : count + 1, 0]
        mean = line[-count + 1 :, 1] * slope + offset  # the line's first point is where it enters the figure
        expected = min(seeds), np.mean(seeds), max(seeds)
        assert np.allclose([low[-1], mean[-1], high[-1]], expected, atol=1e-3), arm
        amount = (at - at[0]) / (at[-1] - at[0]) * flops[arm]
        found[arm] = Curve(amount[1:], mean, low[1:], high[1:])
    return found


def _points(path: str) -> np.ndarray:
    """The vertices of a path of straight lines, [n, 2]."""
    return np.array([[float(number) for number in pair] for pair in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)])


def draw(path: Path) -> None:
    """Write the picture."""
    found, (losses, _) = curves(), final_losses()
    figure = Figure(figsize=(8.2, 3.6), layout="constrained")
    for axes, (placement, title) in zip(figure.subplots(1, 2, sharey=True), PANELS.items(), strict=True):
        for design, colour in COLOURS.items():
            curve, seeds = found[design, placement], losses[design, placement]
            label = f"{design}+1: {np.mean(seeds):.3f} (s.d. {np.std(seeds, ddof=1):.3f})"
            axes.plot(curve.flops / 1e12, curve.mean, "o-", color=colour, linewidth=1.6, markersize=4, label=label)
            axes.fill_between(curve.flops / 1e12, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
        moe, chain = (losses[design, placement] for design in COLOURS)
        gain, p = np.mean(moe) - np.mean(chain), ttest_rel(moe, chain).pvalue
        axes.set_title(title, fontsize="medium")
        text = f"after the same tokens: the chain is {gain:.3f} lower\n(paired t-test over 3 seeds: p = {p:.2f})"
        axes.text(0.03, 0.05, text, transform=axes.transAxes, fontsize="small")
        axes.set_xlabel("training FLOPs ($10^{12}$)")
        axes.grid(color="#dddddd", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    figure.axes[0].set_ylabel("validation loss (nats per token)")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    draw(HERE / "chain-vs-moe.png")
