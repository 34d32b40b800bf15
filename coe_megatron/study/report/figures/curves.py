"""Validation loss over training, and the gain over the baseline."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from coe_megatron.study.plan.names import joined
from coe_megatron.study.report.comparison import Summary
from coe_megatron.study.report.figures.style import (
    GREY,
    LITERAL,
    LOSS_LABEL,
    ArmStyle,
    StudyFigure,
    add_legend,
    by_arm,
    new_figure,
    style_axes,
)
from coe_megatron.study.report.results import Result

_Amount: TypeAlias = Callable[[Result, Mapping[str, Any]], float]  # of a run at an evaluation


def loss_curves(results: Sequence[Result], styles: Mapping[str, ArmStyle]) -> StudyFigure:
    """Loss against steps, tokens, FLOPs and time."""
    amounts: dict[str, tuple[str, _Amount]] = {
        "steps": ("", lambda result, line: line["step"]),
        "tokens (without padding)": ("", lambda result, line: line["tokens"]),
        "training FLOPs": ("", lambda result, line: _fraction_done(result, line) * result.arm.flops),
        "time in steps": ("s", lambda result, line: _fraction_done(result, line) * result.seconds),
    }
    figure, grid = new_figure(2, 2, height=6.2)
    for axes, (title, (unit, amount)) in zip(grid.flat, amounts.items(), strict=True):
        style_axes(axes)
        for name, runs in by_arm(results):
            lines = _common_steps([result.evaluations for result in runs])
            losses = np.array([[line["valid_loss"] for line in some] for some in lines])
            at = np.array([[amount(result, line) for line in some] for result, some in zip(runs, lines, strict=True)])
            style, every = styles[name], math.ceil(losses.shape[1] / 8)
            axes.plot(at.mean(0), losses.mean(0), **style.drawn, markevery=every)
            axes.fill_between(at.mean(0), losses.min(0), losses.max(0), color=style.colour, alpha=0.15, linewidth=0)
        axes.set_xlabel(title)
        axes.xaxis.set_major_formatter(EngFormatter(unit))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        _start_at_first_quarter(axes, results, amount)
    for axes in grid[:, 0]:
        axes.set_ylabel(LOSS_LABEL)
    add_legend(figure, grid[0, 0], styles)
    return StudyFigure(
        "loss-curves",
        "Validation loss against steps, tokens, FLOPs and time, from a quarter of the steps on. Lines are means over "
        "seeds, bands range from the lowest to the highest seed. Time is wall-clock time in steps.",
        figure,
    )


def _fraction_done(result: Result, line: Mapping[str, Any]) -> float:
    return line["step"] / result.run.config.training.steps


def _common_steps(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[Mapping[str, Any]]]:
    """The lines at steps that all runs have."""
    steps = set.intersection(*({line["step"] for line in lines} for lines in runs))
    return [[line for line in lines if line["step"] in steps] for lines in runs]


def _start_at_first_quarter(axes: Axes, results: Sequence[Result], amount: _Amount) -> None:
    """Start the axes after a quarter of the steps, since the initial loss would hide the differences between arms."""
    later = [
        (result, line) for result in results for line in result.evaluations if _fraction_done(result, line) >= 0.25
    ]
    losses, at = [line["valid_loss"] for _, line in later], [amount(result, line) for result, line in later]
    margin = 0.05 * (max(losses) - min(losses)) or 0.1
    axes.set_ylim(min(losses) - margin, max(losses) + margin)
    axes.set_xlim(left=min(at) - 0.03 * max(at))


def gains(summaries: Sequence[Summary], styles: Mapping[str, ArmStyle], baseline: str) -> StudyFigure:
    """The gain of every arm over the baseline."""
    shown = [summary for summary in summaries if summary.gain is not None]
    figure, grid = new_figure(height=1.2 + 0.38 * len(shown))
    axes: Axes = grid[0, 0]
    style_axes(axes)
    base = next(summary for summary in summaries if summary.arm.arm.name == baseline)
    for row, summary in enumerate(shown):
        style = styles[summary.arm.arm.name]
        seeds = [base.losses[seed] - loss for seed, loss in summary.losses.items() if seed in base.losses]
        axes.plot(seeds, [row] * len(seeds), "|", color=style.colour, markersize=9)
        axes.plot([summary.gain or 0.0], [row], **style.marked, markersize=7)
        if summary.interval is not None:
            axes.plot(summary.interval, [row, row], color=style.colour, linewidth=1.4)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_yticks(range(len(shown)), [styles[summary.arm.arm.name].label for summary in shown], **LITERAL)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel("gain in validation loss (nats per token)")
    return StudyFigure(
        "gains",
        f"Gain over the baseline, {joined(base.arm.arm.labels)}: each seed (strokes), the mean (marks), and its 95 % "
        "confidence interval (lines). Right of 0 is better.",
        figure,
    )
