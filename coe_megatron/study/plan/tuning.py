"""Tuning: each arm gets the value of a setting that has the lowest mean validation loss, on seeds of its own.

The tuning runs of an arm are in OUTPUT/ARM/tune/SETTING-VALUE/seed-S. What they have left there decides; nothing else
is stored.
"""

import math
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

from coe_megatron.errors import ConfigError
from coe_megatron.study.plan.amounts import Amounts
from coe_megatron.study.plan.arms import Arm, Run, Study
from coe_megatron.study.plan.names import arm_name, text_of
from coe_megatron.study.plan.past_runs import final_loss
from coe_megatron.study.plan.study_file import RunSeed, Tune


@dataclass(frozen=True)
class TuningCurve:
    """The losses of an arm by the value of the tuned setting.

    Attributes:
        arm: name of the arm.
        title: its labels, for tables and figures.
        setting: the tuned setting.
        values: the grid.
        runs: the tuning runs of each value, one per seed.
        losses: final validation loss in nats per token, by seed, for each value: infinite if the run diverged; seeds
            whose run is not finished are missing.
        set: settings of the tuning runs alone.
    """

    arm: str
    title: str
    setting: str
    values: list[Any]
    runs: list[list[Run]]
    losses: list[dict[int, float]]
    set: dict[str, Any] = field(default_factory=dict)

    @property
    def means(self) -> list[float | None]:
        """Mean loss of each value over the seeds; None while runs are missing."""
        pairs = zip(self.runs, self.losses, strict=True)
        return [mean(losses.values()) if len(losses) == len(runs) else None for runs, losses in pairs]

    @property
    def chosen_index(self) -> int | None:
        """Index of the value with the lowest mean loss, the first of equal ones; None if runs are missing, or no value
        has a finite loss.
        """
        known = [each for each in self.means if each is not None]
        if len(known) < len(self.values) or math.isinf(min(known)):
            return None
        return known.index(min(known))

    @property
    def chosen(self) -> Any:
        """The chosen value; None if there is none yet."""
        return None if (index := self.chosen_index) is None else self.values[index]

    @property
    def at_edge(self) -> bool:
        """Whether the chosen value is the smallest or largest number of the grid, so that the best may be outside."""
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)
        return numbers and self.chosen_index in (0, len(self.values) - 1)

    @property
    def missing(self) -> list[Run]:
        """The runs without a loss."""
        pairs = zip(self.runs, self.losses, strict=True)
        return [run for runs, losses in pairs for run in runs if run.seed not in losses]

    @property
    def outcome(self) -> str:
        """The choice, or why there is none, in one line."""
        total, left = sum(map(len, self.runs)), len(self.missing)
        if left:
            return f"{self.arm}: {self.setting} is not chosen yet: {left} of {total} tuning runs have no loss"
        if (index := self.chosen_index) is None:
            return f"{self.arm}: {self.setting} cannot be chosen: every value of the grid diverged"
        edge = ", at the edge of the grid: the best value may be outside" if self.at_edge else ""
        return f"{self.arm}: {self.setting} {text_of(self.chosen)} is chosen, loss {self.means[index]:.4f}{edge}"


def tune(study: Study, amounts: Amounts) -> tuple[Study, list[TuningCurve]]:
    """Read the tuning runs of a study: returns the study with the chosen value in each arm that has one, and the
    curves of all arms.

    Raises:
        ConfigError: a value is not valid, or changes what the budget holds equal; one line.
    """
    if (settings := study.settings.tune) is None:
        return study, []
    curves, arms = [], []
    for arm in study.arms:
        candidates = [study.with_settings(arm, {settings.setting: value}) for value in settings.values]
        _check_budget(study, settings, arm, candidates, amounts)
        curve = _curve(settings, arm, [study.with_settings(each, settings.set) for each in candidates])
        curves.append(curve)
        arms.append(arm if curve.chosen_index is None else candidates[curve.chosen_index])
    return replace(study, arms=arms), curves


def _curve(settings: Tune, arm: Arm, candidates: list[Arm]) -> TuningCurve:
    seeds, used = [RunSeed(seed, seed) for seed in settings.seeds], set[str]()
    runs = []
    for value, candidate in zip(settings.values, candidates, strict=True):
        used.add(folder := arm_name([f"{settings.setting}-{text_of(value)}"], used))
        runs.append(candidate.runs(seeds, f"tune/{folder}", f"{settings.setting} {text_of(value)}"))
    losses = [{run.seed: loss for run in group if (loss := final_loss(run)) is not None} for group in runs]
    return TuningCurve(arm.name, arm.title, settings.setting, settings.values, runs, losses, settings.set)


def _check_budget(study: Study, settings: Tune, arm: Arm, candidates: list[Arm], amounts: Amounts) -> None:
    if study.settings.budget is None:
        return
    equal = study.settings.budget.equal
    wanted = amounts.run(arm.config).of(equal)
    for value, candidate in zip(settings.values, candidates, strict=True):
        if amounts.run(candidate.config).of(equal) != wanted:
            raise ConfigError(
                f"tune.setting is {settings.setting}: with {text_of(value)}, {arm.name} has another {equal} than the "
                "budget allows; tune a setting that does not change it"
            )
