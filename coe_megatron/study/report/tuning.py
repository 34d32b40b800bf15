"""The tuning of the arms, for the report: a table, and a CSV file with a row per tuning run."""

import math
from collections.abc import Sequence
from typing import Any

from coe_megatron.study.plan.names import text_of
from coe_megatron.study.plan.tuning import TuningCurve
from coe_megatron.study.report.results import as_csv


def tuning_csv(curves: Sequence[TuningCurve]) -> str:
    """One row per tuning run; the loss of a run that diverged is `inf`, and that of an unfinished run empty."""
    return as_csv(row for curve in curves for row in _rows(curve))


def tuning_text(curves: Sequence[TuningCurve]) -> str:
    """What was tuned, and what to mind, in a few sentences of plain text; `curves` has at least one."""
    first = curves[0]
    seeds = ", ".join(str(run.seed) for run in first.runs[0])
    text = (
        f"Each arm has the value of {first.setting} with its lowest mean final validation loss over the seeds {seeds}, "
        "which the comparison does not use."
    )
    if first.set:
        text += f" Tuning runs have {', '.join(f'{key} {text_of(value)}' for key, value in first.set.items())}."
    if open_curves := [curve for curve in curves if curve.chosen_index is None]:
        text += f" No value is chosen yet for {len(open_curves)} of {len(curves)} arms."
    if edges := [f"{curve.title} ({text_of(curve.chosen)})" for curve in curves if curve.at_edge]:
        text += f" At the edge of the grid, so that a better value may lie outside: {', '.join(edges)}."
    return text


def tuning_table(curves: Sequence[TuningCurve]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of plain text: the mean loss of every value, and the chosen one."""
    columns = ["arm", *map(text_of, curves[0].values), "chosen"]
    return columns, [[curve.title, *_means(curve), _chosen(curve)] for curve in curves]


def _means(curve: TuningCurve) -> list[str]:
    return ["-" if each is None else "diverged" if math.isinf(each) else f"{each:.4f}" for each in curve.means]


def _chosen(curve: TuningCurve) -> str:
    if curve.chosen_index is None:
        return "-"
    return text_of(curve.chosen) + " (edge of the grid)" * curve.at_edge


def _rows(curve: TuningCurve) -> list[dict[str, Any]]:
    return [
        {
            "arm": curve.arm,
            "setting": curve.setting,
            "value": text_of(value),
            "seed": run.seed,
            "valid_loss": losses.get(run.seed),
            "chosen": int(index == curve.chosen_index),
        }
        for index, (value, runs, losses) in enumerate(zip(curve.values, curve.runs, curve.losses, strict=True))
        for run in runs
    ]
