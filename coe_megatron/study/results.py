"""What the runs of a study came to, read from their folders: a row for each run, which figures and statistics share."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from coe_megatron.study.arms import Run
from coe_megatron.study.plan import ArmPlan, Plan
from coe_megatron.study.running import why
from coe_megatron.training.logged import read_metrics

_ROUTING = ("entropy", "load_max_over_mean", "dead_experts", "dropped", "overlap")


@dataclass(frozen=True)
class Result:
    """What one run left behind.

    Attributes:
        arm: its plan.
        lines: the objects of its metrics.jsonl, none of a run that has not begun.
        record: its run.json.
    """

    arm: ArmPlan
    run: Run
    lines: Sequence[Mapping[str, Any]]
    record: Mapping[str, Any]

    @property
    def finished(self) -> bool:
        """Whether it came to its last step."""
        attempts = self.record.get("attempts", [])
        return bool(attempts) and attempts[-1]["outcome"] == "finished"

    @property
    def state(self) -> str:
        """`finished`, or why it is not."""
        if self.finished:
            return "finished"
        return why(self.run) or ("not finished" if self.lines else "not begun")

    @cached_property
    def evaluations(self) -> list[Mapping[str, Any]]:
        """The lines with a validation loss."""
        return [line for line in self.lines if line.get("valid_loss") is not None]

    @cached_property
    def steps(self) -> list[Mapping[str, Any]]:
        """The lines of steps, without that before the first one."""
        return [line for line in self.lines if "step_seconds" in line]

    @property
    def loss(self) -> float:
        """The last validation loss, in nats per counted token."""
        return float(self.evaluations[-1]["valid_loss"])

    @property
    def seconds(self) -> float:
        """Spent in steps alone, evaluations and checkpoints not counted."""
        before = [0, *(line["step"] for line in self.steps)]
        return sum(
            (line["step"] - earlier) * line["step_seconds"] for line, earlier in zip(self.steps, before, strict=False)
        )

    @property
    def memory(self) -> int:
        """Bytes at the peak of the rank that reports, as measured."""
        return max(line["memory"]["peak"] for line in self.steps)


def collect(plan: Plan) -> list[Result]:
    """Every run of the study, in its order, done or not."""
    by_name = {arm.arm.name: arm for arm in plan.arms}
    return [_result(by_name[run.arm], run) for run in plan.study.runs]


def done(results: Iterable[Result]) -> list[Result]:
    """Those that are finished."""
    return [result for result in results if result.finished]


def results_csv(results: Sequence[Result]) -> str:
    """A row a run. The same runs give the same bytes: what depends on the hour is in `timings_csv`."""
    return _csv(_row(result) for result in results)


def timings_csv(results: Sequence[Result]) -> str:
    """How fast the finished runs were, a row a run."""
    return _csv(_timing(result) for result in done(results))


def _result(arm: ArmPlan, run: Run) -> Result:
    folder = Path(run.config.output)
    path = folder / "run.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    return Result(arm, run, read_metrics(folder / "metrics.jsonl"), record)


def _row(result: Result) -> dict[str, Any]:
    arm, steps = result.arm, result.run.config.training.steps
    row = {"arm": result.run.arm, **arm.arm.labels, "seed": result.run.seed, "state": result.state}
    row |= {"parameters": arm.parameters, "active_parameters": arm.active_parameters, "steps": steps}
    row |= {"flops_per_token": arm.flops_per_token, "flops": arm.flops, "expert_flops": arm.expert_flops}
    row["memory_foreseen"] = arm.memory
    if not result.finished:
        return row
    last = result.steps[-1]
    row |= {"tokens": last["tokens"], "valid_loss": result.loss, "train_loss": last["train_loss"]}
    row["best_valid_loss"] = min(line["valid_loss"] for line in result.evaluations)
    row["memory_measured"] = result.memory
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
        "attempts": len(result.record["attempts"]),
        "seconds_foreseen": result.arm.seconds.total if result.arm.seconds else None,
    }


def _csv(rows: Iterable[Mapping[str, Any]]) -> str:
    rows = list(rows)
    columns = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
