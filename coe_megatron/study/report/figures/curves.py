"""Validation loss over training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from coe_megatron.study.report.comparison import Summary
from coe_megatron.study.report.figures.descriptions import loss_ranking
from coe_megatron.study.report.figures.panels import facet_grid, facets, plot_band
from coe_megatron.study.report.figures.style import TEXT, ArmStyle, StudyFigure, by_arm, printed
from coe_megatron.study.report.results import Result

_Amount: TypeAlias = Callable[[Result, Mapping[str, Any]], float]  # of a run at an evaluation
_AMOUNTS: Mapping[str, tuple[str, _Amount]] = {
    "steps": ("", lambda result, line: line["step"]),
    "tokens (without padding)": ("", lambda result, line: line["tokens"]),
    "training FLOPs": ("", lambda result, line: _fraction_done(result, line) * result.arm.flops),
    "time in steps": ("s", lambda result, line: _fraction_done(result, line) * result.seconds),
}


@printed
def loss_curves(results: Sequence[Result], summaries: Sequence[Summary], styles: Mapping[str, ArmStyle]) -> StudyFigure:
    """Loss against steps, tokens, FLOPs and time; quantities that are proportional to an earlier one are left out."""
    amounts, proportional = _different_amounts(results)
    runs, labels = dict(by_arm(results)), {name: style.label for name, style in styles.items()}
    grid = facet_grid(facets(list(runs), styles), labels, len(amounts))
    for part in grid.parts:
        for axes, (title, (unit, amount)) in zip(part.axes, amounts.items(), strict=True):
            for name in part.names:
                _plot_runs(axes, runs[name], amount, styles[name])
            axes.set_xlabel(title)
            axes.xaxis.set_major_formatter(EngFormatter(unit))
            axes.xaxis.set_major_locator(MaxNLocator(4))
            _start_at_first_quarter(axes, results, amount)
        part.part.supylabel("loss (nats per token)", fontsize=TEXT)
    grid.finish(labels)
    left_out = f" {' and '.join(proportional).capitalize()} are proportional to one of these." if proportional else ""
    return StudyFigure(
        "loss-curves",
        f"Validation loss against {', '.join(amounts)}, from a quarter of the steps on.{left_out} Lines are means over "
        "seeds, bands their 95 % confidence intervals, cut where they leave the axes. Time is wall-clock time.",
        f"Curves of validation loss that fall during training. {loss_ranking(summaries, labels)}",
        grid.figure,
    )


def _different_amounts(results: Sequence[Result]) -> tuple[dict[str, tuple[str, _Amount]], list[str]]:
    """The amounts, and names of those that are proportional to an earlier one in all runs."""
    kept: dict[str, np.ndarray] = {}
    dropped = []
    for name, (_, amount) in _AMOUNTS.items():
        values = np.array([amount(result, line) for result in results for line in result.evaluations], dtype=float)
        scaled = values / values.max()
        if any(np.allclose(scaled, other, rtol=1e-6) for other in kept.values()):
            dropped.append(name)
        else:
            kept[name] = scaled
    return {name: _AMOUNTS[name] for name in kept}, dropped


def _plot_runs(axes: Axes, runs: Sequence[Result], amount: _Amount, style: ArmStyle) -> None:
    lines = common_steps([result.evaluations for result in runs])
    losses = np.array([[line["valid_loss"] for line in some] for some in lines], dtype=float)
    at = np.array([[amount(result, line) for line in some] for result, some in zip(runs, lines, strict=True)])
    plot_band(axes, at.mean(0), losses, style)


def _fraction_done(result: Result, line: Mapping[str, Any]) -> float:
    return line["step"] / result.run.config.training.steps


def common_steps(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[Mapping[str, Any]]]:
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
    axes.set_xlim(min(at) - 0.03 * max(at), 1.03 * max(at))
