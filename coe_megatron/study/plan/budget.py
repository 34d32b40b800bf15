"""The budget: one setting, solved arm by arm so that one amount of the run comes nearest to the baseline's.

Of few values all are tried. Of many the best is sought by bisection, which is right only where the amount grows (or
shrinks) all the way with the setting: it is measured at several values in between first, and anything else is refused.

An arm must come near the baseline by what the setting can do about it: where the amount is mostly made of what the
setting does not change, every value would be near enough.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any

from coe_megatron.config import RunConfig
from coe_megatron.config.checks import check
from coe_megatron.config.load import parse
from coe_megatron.errors import ConfigError
from coe_megatron.study.plan.amounts import Amounts
from coe_megatron.study.plan.arms import Study
from coe_megatron.study.plan.study_file import Budget

_FEW, _LOOKED_AT = 128, 32  # values of which all are tried; of more, so many evenly over the range


@dataclass(frozen=True)
class Solved:
    """What an arm has of the budget.

    Attributes:
        value: of the setting that was solved for.
        amount: of what is held equal.
        off: by how much more than the baseline has, as a share of that.
    """

    value: int
    amount: float
    off: float


def solve(study: Study, amounts: Amounts) -> tuple[Study, dict[str, Solved]]:
    """The study with the solved setting in every arm, and what was found by arm; the baseline keeps its own.

    Raises:
        ConfigError: the setting is no whole number, or has no value with which an arm comes near enough; one line.
    """
    budget = study.settings.budget
    if budget is None:
        return study, {}
    wanted = amounts.of(budget.equal, study.baseline.config)
    arms, found = [], {}
    for arm in study.arms:
        if arm is study.baseline:
            own = _whole_number(study, budget, arm.config)
            found[arm.name] = Solved(own, wanted, 0.0)
        else:
            try:
                _whole_number(study, budget, arm.config)
                found[arm.name] = _solve(budget, arm.config, wanted, amounts)
            except ConfigError as error:
                raise ConfigError(f"arm {arm.name}: {error}") from None
            arm = study.with_setting(arm, budget.solve, found[arm.name].value)
        arms.append(arm)
    return replace(study, arms=arms), found


class NotSolvable(ValueError):
    """No value of a range gives an amount; one line."""


def nearest(amount: Callable[[int], float], values: range, wanted: float) -> int:
    """The value at which an amount comes nearest to what is wanted; of two as near the smaller one.

    Raises:
        NotSolvable: it is the same everywhere, or, of more values than are tried one by one, not monotone; one line.
    """
    if len(values) <= _FEW:
        amounts = {value: amount(value) for value in values}
        if len(set(amounts.values())) == 1:
            raise NotSolvable("it is the same with every value")
        return min(values, key=lambda value: abs(amounts[value] - wanted))
    looked_at = sorted({values[len(values) * number // _LOOKED_AT] for number in range(_LOOKED_AT)} | {values[-1]})
    seen = [amount(value) for value in looked_at]
    grows = seen[0] <= seen[-1]
    for before, after, value in zip(seen, seen[1:], looked_at[1:], strict=False):
        if (before < after) if not grows else (before > after):
            raise NotSolvable(f"it {'shrinks' if grows else 'grows'} on the way to {value}, and not elsewhere")
    if seen[0] == seen[-1]:
        raise NotSolvable("it is the same with every value")
    low, high = 0, len(values) - 1  # the last index with no more than is wanted, or the first of all
    while low < high:
        middle = (low + high + 1) // 2
        if (amount(values[middle]) <= wanted) == grows:
            low = middle
        else:
            high = middle - 1
    return min(values[low : low + 2], key=lambda value: abs(amount(value) - wanted))


def _solve(budget: Budget, config: RunConfig, wanted: float, amounts: Amounts) -> Solved:
    first = -(-budget.range[0] // budget.multiple_of) * budget.multiple_of
    values = range(first, budget.range[1] + 1, budget.multiple_of)
    if not values:
        raise ConfigError(f"budget.range is {list(budget.range)}: no multiple of {budget.multiple_of} lies in it")

    def changed(value: int) -> RunConfig:
        return _changed(config, budget.solve.split("."), value)

    def amount(value: int) -> float:
        try:
            return amounts.of(budget.equal, changed(value))
        except ConfigError as error:
            raise ConfigError(f"budget.range leads to {budget.solve} {value}: {error}") from error

    try:
        check(parse(asdict(changed(values[-1]))))  # to measure what no run can have might take for ever
    except ConfigError as error:
        raise ConfigError(f"budget.range leads to {budget.solve} {values[-1]}: {error}") from error
    try:
        value = nearest(amount, values, wanted)
    except NotSolvable as error:
        raise ConfigError(f"{budget.equal} cannot be solved for {budget.solve}: {error}") from None
    found = amount(value)
    _require_near(budget, values, value, found - wanted, wanted, abs(amount(values[-1]) - amount(values[0])))
    return Solved(value, found, found / wanted - 1)


def _require_near(budget: Budget, values: range, value: int, off: float, wanted: float, change: float) -> None:
    """Refuse an arm that is off by more than `tolerance` of the baseline's, or of what the whole range changes."""
    if abs(off) <= budget.tolerance * min(wanted, change):
        return
    of_change = f" ({abs(off) / change:.1%} of what the range changes)" if change < wanted else ""
    raise ConfigError(
        f"{budget.solve} {values[0]} to {values[-1]} brings {budget.equal} no nearer to the baseline's than "
        f"{off / wanted:+.1%}{of_change}, with {value}: budget.tolerance is {budget.tolerance}, so widen that or "
        "budget.range"
    )


def _whole_number(study: Study, budget: Budget, config: RunConfig) -> int:
    """The setting's value in a config; ConfigError if that is none, or nothing that a whole number can be put into."""
    value: Any = config
    for name in budget.solve.split("."):
        value = getattr(value, name) if is_dataclass(value) and name in {each.name for each in fields(value)} else None
    if type(value) is int:
        return value
    if value is None:
        study.with_setting(study.baseline, budget.solve, budget.range[0])  # says it if there is no such setting
    raise ConfigError(f"budget.solve is {budget.solve}: it must name a setting that is a whole number")


def _changed(config: Any, names: list[str], value: int) -> Any:
    inner = value if len(names) == 1 else _changed(getattr(config, names[0]), names[1:], value)
    return replace(config, **{names[0]: inner})
