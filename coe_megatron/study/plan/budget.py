"""The budget: solve for one setting in every arm, so that one total of the run is nearest to the baseline's.

We try all values if there are few. Otherwise we use bisection, which requires a monotone amount: we check several
values in between first, and refuse an amount that is not monotone.

The tolerance is relative to what the setting can change: if most of the amount does not depend on the setting, every
value would otherwise be within tolerance.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any

from coe_megatron.config import RunConfig
from coe_megatron.config.change import with_setting
from coe_megatron.config.checks import check
from coe_megatron.config.load import parse
from coe_megatron.errors import ConfigError
from coe_megatron.study.plan.amounts import Amounts
from coe_megatron.study.plan.arms import Study
from coe_megatron.study.plan.study_file import Budget

_MAX_TRIED, _SAMPLES = 128, 32  # up to the first, we try all values; otherwise we sample the range


@dataclass(frozen=True)
class Solved:
    """The solution of an arm.

    Attributes:
        value: value of the setting that was solved for.
        amount: resulting amount of the budgeted quantity.
        deviation: relative deviation of the amount from the baseline's.
    """

    value: int
    amount: float
    deviation: float


def solve(study: Study, amounts: Amounts) -> tuple[Study, dict[str, Solved]]:
    """Solve the budget: returns the study with the setting in every arm, and the solutions by arm. A baseline keeps its
    own value, and the arms that are compared with it match its amount.

    Raises:
        ConfigError: the setting is not an integer, or no value is within tolerance; one line.
    """
    budget = study.settings.budget
    if budget is None:
        return study, {}
    wanted = {arm.name: amounts.run(arm.config).of(budget.equal) for arm in study.arms if arm.is_baseline}
    arms, found = [], {}
    for arm in study.arms:
        if arm.is_baseline:
            own = _integer_setting(study, budget, arm.config)
            found[arm.name] = Solved(own, wanted[arm.name], 0.0)
        else:
            try:
                _integer_setting(study, budget, arm.config)
                found[arm.name] = _solve(budget, arm.config, wanted[arm.baseline], amounts)
            except ConfigError as error:
                raise ConfigError(f"arm {arm.name}: {error}") from None
            arm = study.with_settings(arm, {budget.solve: found[arm.name].value})
        arms.append(arm)
    return replace(study, arms=arms), found


class NotSolvable(ValueError):
    """No value of a range gives an amount; one line."""


def nearest(amount: Callable[[int], float], values: range, wanted: float) -> int:
    """The value whose amount is nearest to `wanted`; the smaller one of a tie.

    Raises:
        NotSolvable: the amount is constant; or there are too many values to try all, and it is not monotone; one line.
    """
    if len(values) <= _MAX_TRIED:
        amounts = {value: amount(value) for value in values}
        if len(set(amounts.values())) == 1:
            raise NotSolvable("it is the same for every value")
        return min(values, key=lambda value: abs(amounts[value] - wanted))
    samples = sorted({values[len(values) * number // _SAMPLES] for number in range(_SAMPLES)} | {values[-1]})
    seen = [amount(value) for value in samples]
    grows = seen[0] <= seen[-1]
    for before, after, value in zip(seen, seen[1:], samples[1:], strict=False):
        if (before < after) if not grows else (before > after):
            raise NotSolvable(f"it is not monotone: it {'shrinks' if grows else 'grows'} just below {value}")
    if seen[0] == seen[-1]:
        raise NotSolvable("it is the same for every value")
    low, high = 0, len(values) - 1  # the last index with at most `wanted`, or the first index
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
        raise ConfigError(f"budget.range is {list(budget.range)}: it contains no multiple of {budget.multiple_of}")

    def changed(value: int) -> RunConfig:
        return with_setting(config, budget.solve, value)

    def amount(value: int) -> float:
        try:
            return amounts.run(changed(value)).of(budget.equal)
        except ConfigError as error:
            raise ConfigError(f"budget.range includes {budget.solve} {value}: {error}") from error

    try:
        check(parse(asdict(changed(values[-1]))))  # computing amounts of an invalid config might never end
    except ConfigError as error:
        raise ConfigError(f"budget.range includes {budget.solve} {values[-1]}: {error}") from error
    try:
        value = nearest(amount, values, wanted)
    except NotSolvable as error:
        raise ConfigError(f"{budget.equal} cannot be solved for {budget.solve}: {error}") from None
    found = amount(value)
    _require_near(budget, values, value, found - wanted, wanted, abs(amount(values[-1]) - amount(values[0])))
    return Solved(value, found, found / wanted - 1)


def _require_near(budget: Budget, values: range, value: int, deviation: float, wanted: float, change: float) -> None:
    """Refuse a deviation of more than `tolerance` of the baseline's amount, or of the change over the range."""
    if abs(deviation) <= budget.tolerance * min(wanted, change):
        return
    of_change = f", {abs(deviation) / change:.1%} of the change over the range" if change < wanted else ""
    raise ConfigError(
        f"no {budget.solve} from {values[0]} to {values[-1]} matches the baseline's {budget.equal}: the nearest is "
        f"{deviation / wanted:+.1%}{of_change}, with {value}; budget.tolerance is {budget.tolerance}: widen it or "
        "budget.range"
    )


def _integer_setting(study: Study, budget: Budget, config: RunConfig) -> int:
    """The setting's value in a config; ConfigError if there is no such setting, or it is not an integer."""
    value: Any = config
    for name in budget.solve.split("."):
        value = getattr(value, name) if is_dataclass(value) and name in {each.name for each in fields(value)} else None
    if type(value) is int:
        return value
    if value is None:
        study.with_settings(study.baseline, {budget.solve: budget.range[0]})  # raises if there is no such setting
    raise ConfigError(f"budget.solve is {budget.solve}: it must name an integer setting")
