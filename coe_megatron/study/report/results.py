"""Results of the runs of a study, read from their folders; figures and statistics use the same results."""

import csv
import io
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from coe_megatron.errors import one_line
from coe_megatron.estimate.memory import MEASURED
from coe_megatron.run.metrics_check import find_damage
from coe_megatron.run.metrics_log import read_metrics
from coe_megatron.study.plan.arms import Run
from coe_megatron.study.plan.calibration import seconds_in_steps
from coe_megatron.study.plan.cost_table import ArmPlan, Plan
from coe_megatron.study.plan.past_runs import changed
from coe_megatron.study.run.runner import run_status

_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")  # start of a cell that spreadsheets evaluate
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?(e[-+]?\d+)?", re.IGNORECASE)
_ROUTING = ("entropy", "load_max_over_mean", "dead_experts", "dropped", "overlap")


@dataclass(frozen=True)
class Result:
    """The result of one run.

    Attributes:
        arm: plan of its arm.
        lines: the objects of its metrics.jsonl; empty if the run has not started.
        attempts: number of starts.
        state: `finished` if it reached the last step with the study's settings and has a validation loss there;
            otherwise the reason why not, in one line.
    """

    arm: ArmPlan
    run: Run
    lines: Sequence[Mapping[str, Any]]
    attempts: int
    state: str

    @property
    def finished(self) -> bool:
        """Whether figures and statistics include it."""
        return self.state == "finished"

    @cached_property
    def evaluations(self) -> list[Mapping[str, Any]]:
        """The lines with a validation loss."""
        return [line for line in self.lines if line.get("valid_loss") is not None]

    @cached_property
    def steps(self) -> list[Mapping[str, Any]]:
        """The lines of steps, without the evaluation before the first step."""
        return [line for line in self.lines if "step_seconds" in line]

    @property
    def loss(self) -> float:
        """The final validation loss, in nats per token."""
        return float(self.lines[-1]["valid_loss"])

    @cached_property
    def seconds(self) -> float:
        """Seconds in steps, without evaluations and checkpoints."""
        return seconds_in_steps(self.steps)

    @property
    def memory(self) -> int:
        """Measured peak memory of rank 0 in bytes."""
        return max(line["memory"]["peak"] for line in self.steps)


def collect(plan: Plan) -> list[Result]:
    """Results of all runs of the study in order, finished or not."""
    by_name, now = {arm.arm.name: arm for arm in plan.arms}, time.time()
    return [_result(by_name[run.arm], run, now) for run in plan.study.runs]


def set_losses(result: Result) -> dict[str, float]:
    """The final loss of each validation set in nats per token, if the run has several."""
    parts = result.lines[-1].get("valid", {}).items()
    return {name: part["loss"] for name, part in parts if part.get("loss") is not None}


def answers_of(result: Result) -> tuple[float, int] | None:
    """The final accuracy of answers and the number of problems; None without `training.evaluate_answers`."""
    last = result.lines[-1]
    if (accuracy := last.get("answer_accuracy")) is None:
        return None
    return accuracy, last.get("answer_problems") or result.run.config.training.evaluate_answers


def largest_rise(result: Result) -> float:
    """The largest rise of the validation loss above an earlier evaluation, in nats per token; 0 if it never rises."""
    losses = [line["valid_loss"] for line in result.evaluations]
    return max(later - lowest for later, lowest in zip(losses, accumulate(losses, min), strict=True))


def group_accuracies(result: Result) -> dict[str, float]:
    """The final accuracy of answers by group of problems; empty if problems have no groups."""
    return {name: found["accuracy"] for name, found in result.steps[-1].get("answer_groups", {}).items()}


def finished_results(results: Iterable[Result]) -> list[Result]:
    """The results of finished runs."""
    return [result for result in results if result.finished]


def results_csv(results: Sequence[Result]) -> str:
    """One row per run. The same runs give the same bytes: values that depend on the number of attempts, or on the
    machine, are in `timings_csv`.
    """
    return as_csv(_row(result) for result in results)


def timings_csv(results: Sequence[Result]) -> str:
    """Speed and memory of the finished runs; one row per run."""
    return as_csv(_timing(result) for result in finished_results(results))


def _result(arm: ArmPlan, run: Run, now: float) -> Result:
    found, path = run_status(run, now), Path(run.config.output) / "metrics.jsonl"
    try:
        lines = read_metrics(path)
    except (ValueError, OSError) as error:
        reason = one_line(str(error)).removeprefix(f"{path}, ")
        return Result(arm, run, [], found.attempts or 0, f"its metrics.jsonl cannot be read ({reason})")
    state = found.state if found.reason is None else f"{found.state}: {found.reason}"
    if found.state == "no run":
        state = "not started"
    elif reason := changed(run):
        state = reason
    elif found.state == "finished" and not _evaluated_at(run.config.training.steps, lines):
        state = "finished, but without a validation loss after the last step"
    elif found.state == "finished" and (reason := find_damage(lines, run.config.moe.num_experts)):
        state = f"its metrics.jsonl is damaged ({reason})"
    return Result(arm, run, lines, found.attempts or 0, state)


def _evaluated_at(step: int, lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last line is of this step and has a finite loss (otherwise it is null)."""
    return bool(lines) and lines[-1]["step"] == step and lines[-1].get("valid_loss") is not None


def _row(result: Result) -> dict[str, Any]:
    arm, steps = result.arm, result.run.config.training.steps
    labels = {f"axis_{name}": label for name, label in arm.arm.labels.items()}  # an axis may be called `steps`
    row = {"arm": result.run.arm, **labels, "seed": result.run.seed, "state": result.state}
    row |= {"parameters": arm.parameters, "active_parameters": arm.active_parameters, "steps": steps}
    row |= {"flops_per_token": arm.flops_per_token, "flops": arm.flops, "expert_flops": arm.expert_flops}
    row["memory_predicted"] = arm.memory
    row |= {f"memory_predicted_{name}": amount for name, amount in arm.components.items()}
    if not result.finished:
        return row
    last = result.steps[-1]
    row |= {"tokens": last["tokens"], "valid_loss": result.loss, "train_loss": last["train_loss"]}
    row |= {f"valid_loss_{name}": loss for name, loss in set_losses(result).items()}
    if answered := answers_of(result):
        row |= {"answer_accuracy": answered[0], "answer_problems": answered[1]}
    row |= {f"answer_accuracy_{name}": accuracy for name, accuracy in group_accuracies(result).items()}
    row["best_valid_loss"] = min(line["valid_loss"] for line in result.evaluations)
    row["largest_rise"] = largest_rise(result)
    return row | {f"routing_{name}": last.get(f"routing_{name}") for name in _ROUTING}


def _timing(result: Result) -> dict[str, Any]:
    last = result.steps[-1]
    return {
        "arm": result.run.arm,
        "seed": result.run.seed,
        "seconds_in_steps": result.seconds,
        "tokens_per_second": last["tokens_per_second"],
        "tflops": last["tflops"],
        "mfu": last.get("mfu"),
        "attempts": result.attempts,
        "memory_measured": result.memory,
        **{f"memory_measured_{name}": last["memory"].get(name) for name in MEASURED},
        "seconds_predicted": result.arm.seconds.total if result.arm.seconds else None,
    }


def cell(value: Any) -> Any:
    """Prefix text that a spreadsheet would evaluate as a formula with ', unless it is a number."""
    if isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def as_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows by column as CSV; columns are in the order in which they first appear."""
    rows = list(rows)
    columns = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()
