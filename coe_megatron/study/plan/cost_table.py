"""The predicted cost of a study: a row per arm, and totals."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from coe_megatron.errors import ConfigError, one_line
from coe_megatron.estimate.advice import device_memory_option, refusal
from coe_megatron.estimate.machine import Machine
from coe_megatron.estimate.machine import machine as machine_named
from coe_megatron.estimate.memory import components
from coe_megatron.estimate.run_estimate import estimate, size
from coe_megatron.estimate.run_time import RunSeconds
from coe_megatron.study.plan.amounts import Amounts, Speed
from coe_megatron.study.plan.arms import Arm, Run, Study, make_study
from coe_megatron.study.plan.budget import Solved, solve
from coe_megatron.study.plan.calibration import calibrate
from coe_megatron.study.plan.names import joined
from coe_megatron.study.plan.study_file import RunSeed, read_study
from coe_megatron.study.plan.tuning import TuningCurve, tune
from coe_megatron.text import aligned, format_duration


@dataclass(frozen=True)
class ArmPlan:
    """Predicted costs of one run of an arm.

    Attributes:
        parameters: parameters of the model.
        active_parameters: parameters that a token uses.
        flops_per_token: training FLOPs per token, forward and backward.
        flops: training FLOPs of all steps.
        expert_flops: the part of `flops` in routed and shared experts.
        components: peak memory of the largest rank in bytes, by `estimate.memory.components`.
        ranks: ranks of a run.
        seconds: predicted time; None if the machine is unknown.
        solved: the solution of the budget; None without a budget.
        too_large: why the arm does not fit a device, and what would fit; None if it fits or the memory is unknown.
    """

    arm: Arm
    parameters: int
    active_parameters: int
    flops_per_token: int
    flops: float
    expert_flops: float
    components: dict[str, int]
    ranks: int
    seconds: RunSeconds | None
    solved: Solved | None
    too_large: str | None

    @property
    def memory(self) -> int:
        """Peak memory of the largest rank in bytes."""
        return sum(self.components.values())


@dataclass(frozen=True)
class Plan:
    """A study and its predicted costs.

    Attributes:
        study: the study, with its budget solved.
        arms: costs of its arms, in order.
        speed: the speed from which seconds are predicted; None if the machine is unknown.
        calibrated_by: the folder of the run that it was measured with; None if it was not.
        price: price per device hour, in any currency; None if unknown.
        tuning: the tuning of each arm; empty if the study tunes nothing.
        tuning_seconds: predicted device seconds of all tuning runs; None if unknown.
    """

    study: Study
    arms: list[ArmPlan]
    speed: Speed | None
    calibrated_by: Path | None
    price: float | None
    tuning: list[TuningCurve] = field(default_factory=list)
    tuning_seconds: float | None = 0.0

    @property
    def tuning_runs(self) -> list[Run]:
        """All tuning runs, arm by arm."""
        return [run for curve in self.tuning for runs in curve.runs for run in runs]

    @property
    def ready_runs(self) -> list[Run]:
        """The comparison's runs of arms that need no tuning, or whose value is chosen."""
        waiting = {curve.arm for curve in self.tuning if curve.chosen_index is None}
        return [run for run in self.study.runs if run.arm not in waiting]

    @property
    def device_seconds(self) -> float | None:
        """Device seconds of all runs, including tuning."""
        seeds, predicted = len(self.study.settings.seeds), [arm.seconds for arm in self.arms]
        if None in predicted or self.tuning_seconds is None:
            return None
        return self.tuning_seconds + sum(seeds * arm.ranks * arm.seconds.total for arm in self.arms if arm.seconds)

    @property
    def cost(self) -> float | None:
        """Cost of all runs, in the currency of the price."""
        if self.price is None or self.device_seconds is None:
            return None
        return self.price * self.device_seconds / 3600

    def as_dict(self) -> dict[str, Any]:
        """Unrounded values, for JSON."""
        study, settings = self.study, self.study.settings
        return {
            "output": settings.output,
            "seeds": settings.seeds,
            "baseline": study.baseline.name,
            "margin": settings.margin,
            "budget": asdict(settings.budget) if settings.budget else None,
            "speed": self._speed_as_dict(),
            "arms": [_as_dict(arm, settings.run_seeds) for arm in self.arms],
            "tuning": [_tuning_as_dict(curve) for curve in self.tuning],
            "skipped": [{"labels": dict(labels), "reason": reason} for labels, reason in study.skipped],
            "total": {
                "runs": len(study.runs),
                "tuning_runs": len(self.tuning_runs),
                "device_seconds": self.device_seconds,
                "price_per_hour": self.price,
                "cost": self.cost,
            },
        }

    def _speed_as_dict(self) -> dict[str, Any] | None:
        if self.speed is None:
            return None
        values = {name: value for name, value in vars(self.speed).items() if name != "machine"}
        calibrated_by = None if self.calibrated_by is None else str(self.calibrated_by)
        return {"machine": self.speed.machine.name, "calibrated_by": calibrated_by, **values}

    def table(self) -> str:
        """The same as a text table."""
        study = self.study
        lines = aligned([_columns(study), *(self._cells(arm) for arm in self.arms)])
        notes = [*self._baselines(), *self._totals(), *(curve.outcome for curve in self.tuning)]
        notes += [f"{arm.arm.name} does not fit: {arm.too_large}" for arm in self.arms if arm.too_large]
        skipped: dict[str, list[str]] = {}
        for labels, reason in study.skipped:
            skipped.setdefault(reason, []).append(joined(labels))
        notes += [f"skipped, {reason}: {', '.join(names)}" for reason, names in skipped.items()]
        return "\n".join([*lines, "", *self._memory(), "", *map(one_line, notes)])

    def _baselines(self) -> list[str]:
        """What the arms are compared with."""
        study = self.study
        baselines = [arm.name for arm in study.arms if arm.is_baseline]
        if len(baselines) == 1:
            return [f"* {baselines[0]} is the baseline"]
        named = {axis for axis, label in study.settings.baseline.items() if label is not None}
        shared = [axis for axis in study.arms[0].labels if axis not in named]
        lines = [f"* {len(baselines)} baselines: an arm is compared with the one of its {', '.join(shared)}"]
        for arm in study.arms:  # whose own baseline is skipped
            baseline = study.arm(arm.baseline)
            if any(arm.labels[axis] != baseline.labels[axis] for axis in shared):
                lines.append(f"{arm.name} is compared with {arm.baseline}")
        return lines

    def _memory(self) -> list[str]:
        """Rows of peak memory per rank, by component."""
        names = list(self.arms[0].components)
        header = ["peak MiB per rank", *(name.replace("_", " ") for name in names), "total"]
        rows = [[arm.arm.name, *map(_mib, arm.components.values()), _mib(arm.memory)] for arm in self.arms]
        return aligned([header, *rows])

    def _cells(self, plan: ArmPlan) -> list[str]:
        steps = plan.arm.config.training.steps
        cells = [
            plan.arm.name + "*" * plan.arm.is_baseline,
            format_count(plan.parameters),
            format_count(plan.flops_per_token),
            format_count(plan.flops),
            format_count(plan.expert_flops),
            f"{steps:,}",
            size(plan.memory) + "!" * (plan.too_large is not None),
            format_duration(plan.seconds.total) if plan.seconds else "-",
        ]
        if plan.solved is None:
            return cells
        solved = [f"{plan.solved.value:,}"] if _has_solve_column(self.study) else []
        return [*cells, *solved, f"{plan.solved.deviation:+.2%}"]

    def _totals(self) -> list[str]:
        arms, seeds, runs = len(self.arms), len(self.study.settings.seeds), len(self.study.runs)
        lines = [f"{runs} runs: {arms} arms, {seeds} seed{'s' * (seeds > 1)} each"]
        if tune := self.study.settings.tune:
            lines[0] += f", after {len(self.tuning_runs)} to tune {tune.setting}"
        if self.speed is not None and self.device_seconds is not None:
            lines[0] += f"; {format_duration(self.device_seconds)} on one device"
            lines[0] += f", {self.cost:,.2f} at {self.price:g} per hour" if self.cost is not None else ""
            times = f"times on {self.speed.machine.name}"
            if self.calibrated_by is not None:
                times += f", {self.speed.factor:.2f} times as long a step as predicted, as in {self.calibrated_by}"
            lines.append(times)
        if budget := self.study.settings.budget:
            lines.append(f"{budget.equal.replace('_', ' ')} equal to the baseline's: {budget.solve} is solved for it")
        return lines


def make_plan(
    path: Path,
    overrides: Sequence[str] = (),
    machine: str | None = None,
    calibration: Path | None = None,
    device_memory: str | None = None,
    price: float | None = None,
) -> Plan:
    """Read a study file, resolve its arms and predict their costs.

    Args:
        overrides: `key=value` for all arms.
        machine: a machine file, or a packaged one by its name; None for the study's own.
        calibration: folder of a finished run on such a machine, whose measured speed is used.
        device_memory: such as `80GiB`; None for the device's.
        price: price per device hour; None for the machine's.

    Raises:
        ConfigError: one line that names the key of the study, the setting or the option, and what would be valid.
    """
    study = make_study(read_study(path), overrides)
    found = _machine(machine, study.settings.machine)
    capacity = found.memory.capacity if found is not None else None
    memory = int(capacity) if capacity is not None else None
    memory = memory if device_memory is None else device_memory_option(device_memory)
    if calibration is not None and found is None:
        raise ConfigError("--calibration requires a machine: name it in the study file (machine) or with --machine")
    speed = None if found is None else Speed(found) if calibration is None else calibrate(calibration, found)
    price = price if price is not None or found is None else found.price
    amounts = Amounts(speed)
    study, solved = solve(study, amounts)
    study, curves = tune(study, amounts)
    arms = [_plan(arm, amounts, solved.get(arm.name), memory) for arm in study.arms]
    seconds = _tuning_seconds(curves, amounts) if speed else None
    return Plan(study, arms, speed, calibration, price, curves, seconds)


def _tuning_seconds(curves: Sequence[TuningCurve], amounts: Amounts) -> float:
    """Predicted device seconds of all tuning runs; those of one value take equally long."""
    total = 0.0
    for runs in (runs for curve in curves for runs in curve.runs):
        run = amounts.run(runs[0].config)
        total += len(runs) * run.shape.layout.world_size * run.seconds.total
    return total


def _machine(option: str | None, own: str | None) -> Machine | None:
    """The machine of the option, or the study's own."""
    try:
        return machine_named(name) if (name := option or own) is not None else None
    except ConfigError as error:
        raise ConfigError(f"{'--machine' if option else 'machine'} is {error}") from None


def _plan(arm: Arm, amounts: Amounts, solved: Solved | None, memory: int | None) -> ArmPlan:
    run = amounts.run(arm.config)
    cost = estimate(run.shape)
    return ArmPlan(
        arm,
        parameters=cost.parameters.total,
        active_parameters=cost.parameters.active,
        flops_per_token=cost.flops_per_token.total,
        flops=run.of("flops"),
        expert_flops=run.of("expert_compute"),
        components=components(cost.memory),
        ranks=run.shape.layout.world_size,
        seconds=run.seconds if amounts.speed else None,
        solved=solved,
        too_large=refusal(run.shape, cost, memory) if memory is not None else None,
    )


def _tuning_as_dict(curve: TuningCurve) -> dict[str, Any]:
    finite = [{seed: loss if math.isfinite(loss) else None for seed, loss in each.items()} for each in curve.losses]
    return {
        "arm": curve.arm,
        "setting": curve.setting,
        "values": curve.values,
        "losses": finite,
        "chosen": curve.chosen,
        "at_edge": curve.at_edge,
        "runs": [[run.config.output for run in runs] for runs in curve.runs],
    }


def _as_dict(plan: ArmPlan, seeds: Sequence[RunSeed]) -> dict[str, Any]:
    arm, seconds = plan.arm, plan.seconds
    return {
        "name": arm.name,
        "labels": dict(arm.labels),
        "baseline": arm.baseline,
        "overrides": list(arm.overrides),
        "fingerprint": arm.fingerprint,
        "runs": [run.config.output for run in arm.runs(seeds)],
        "steps": arm.config.training.steps,
        "ranks": plan.ranks,
        "parameters": plan.parameters,
        "active_parameters": plan.active_parameters,
        "flops_per_token": plan.flops_per_token,
        "training_flops": plan.flops,
        "expert_flops": plan.expert_flops,
        "memory_bytes_per_rank": {"total": plan.memory} | plan.components,
        "too_large": plan.too_large,
        "seconds": {"total": seconds.total, **asdict(seconds)} if seconds else None,
        "solved": asdict(plan.solved) if plan.solved else None,
    }


def _columns(study: Study) -> list[str]:
    columns = [
        "arm",
        "parameters",
        "FLOPs per token",
        "FLOPs per run",
        "expert FLOPs",
        "steps",
        "memory per rank",
        "time per run",
    ]
    if (budget := study.settings.budget) is None:
        return columns
    return [*columns, *([budget.solve] if _has_solve_column(study) else []), "deviation"]


def _has_solve_column(study: Study) -> bool:
    """Whether the solved setting needs its own column."""
    return study.settings.budget is not None and study.settings.budget.solve != "training.steps"


def _mib(amount: int) -> str:
    return f"{amount / 2**20:,.1f}"


def format_count(number: float) -> str:
    """A large number with four digits and a unit prefix."""
    for unit, length in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= length:
            return f"{number / length:.4g} {unit}"
    return f"{number:.0f}"
