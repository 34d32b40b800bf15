"""What an axis of a study varies: its settings, which of them is the amount that the axis steps through, and series."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from coe_megatron.study.plan.names import text_of
from coe_megatron.study.report.comparison import Summary

_OWN = {"output", "training.seed", "training.data_seed"}  # of every arm or run
# The settings that most readers ask for come first.
_FIRST = (
    "chain.iterations",
    "moe.topk",
    "moe.num_experts",
    "model.num_layers",
    "model.hidden_size",
    "parallel.world_size",
    "training.steps",
)


@dataclass(frozen=True)
class Series:
    """Arms that differ in one amount only, and in what the study changes with it.

    Attributes:
        label: what they have in common.
        points: amount and arm, by ascending amount.
        joined: whether amounts are distinct, so that a line through them means something.
    """

    label: str
    points: Sequence[tuple[float, Summary]]

    @property
    def joined(self) -> bool:
        """Whether a line can join the points."""
        return len({value for value, _ in self.points}) == len(self.points) > 1


@dataclass(frozen=True)
class Amount:
    """A numeric setting that an axis varies.

    Attributes:
        setting: its name, such as `moe.topk`.
        tied: settings that change with it, each with its values in the order of the amount's.
    """

    setting: str
    series: Sequence[Series]
    tied: Mapping[str, Sequence[Any]]

    @property
    def values(self) -> list[float]:
        """Distinct amounts in ascending order."""
        return sorted({value for each in self.series for value, _ in each.points})


def axis_groups(summaries: Sequence[Summary], axis: str) -> Iterator[tuple[tuple[str, ...], list[Summary]]]:
    """Groups of arms that have the same labels, which come first, on all axes but one."""

    def others(summary: Summary) -> tuple[str, ...]:
        return tuple(label for name, label in summary.arm.arm.labels.items() if name != axis)

    for labels, group in groupby(sorted(summaries, key=others), key=others):
        yield labels, list(group)


def amounts(summaries: Sequence[Summary], axis: str, consequences: Collection[str] = ()) -> list[Amount]:
    """The amounts to draw for an axis; empty if it varies no number by itself.

    If numbers are all that the axis varies, and one of them tells its labels apart, that one is drawn for all of them:
    the others would give the same picture. Otherwise every number is drawn for the arms that differ in nothing else.

    Args:
        consequences: settings that follow from others, such as steps solved for a budget, or a tuned rate.
    """
    groups = [(" ".join(others), group) for others, group in axis_groups(summaries, axis)]
    settings = {each.arm.arm.name: _settings(each, consequences) for each in summaries}
    varied = _varied([group for _, group in groups], settings)
    numeric = [key for key in varied if all(_is_number(settings[each.arm.arm.name][key]) for each in summaries)]
    if whole := [key for key in numeric if _tells_apart(key, groups, settings)][:1] if numeric == varied else []:
        key = whole[0]
        series = [_series(others, group, key, settings) for others, group in groups]
        tied = {other: _tied(key, other, settings) for other in varied if other != key}
        return [Amount(key, series, tied)]
    found = [Amount(key, list(_alone(axis, key, groups, settings)), {}) for key in varied]
    return [each for each in found if each.series]


def _settings(summary: Summary, consequences: Collection[str]) -> dict[str, Any]:
    flat = _flat(asdict(summary.arm.arm.config))
    return {key: value for key, value in flat.items() if key not in _OWN and key not in consequences}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def _varied(groups: Sequence[Sequence[Summary]], settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Settings that differ within a group, in the order of interest."""
    found: dict[str, None] = {}
    for group in groups:
        own = [settings[each.arm.arm.name] for each in group]
        keys = dict.fromkeys(key for each in own for key in each)
        found |= dict.fromkeys(key for key in keys if any(each.get(key) != own[0].get(key) for each in own))
    return sorted(found, key=lambda key: (_FIRST.index(key) if key in _FIRST else len(_FIRST), key))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _tells_apart(
    key: str, groups: Sequence[tuple[str, Sequence[Summary]]], settings: Mapping[str, Mapping[str, Any]]
) -> bool:
    values = [[settings[each.arm.arm.name][key] for each in group] for _, group in groups]
    return all(len(set(each)) == len(each) for each in values)


def _series(label: str, group: Sequence[Summary], key: str, settings: Mapping[str, Mapping[str, Any]]) -> Series:
    points = [(float(settings[each.arm.arm.name][key]), each) for each in group]
    return Series(label, sorted(points, key=lambda point: point[0]))


def _tied(key: str, other: str, settings: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """Values of another setting along an amount; those of the first arm with each."""
    values: dict[float, Any] = {}
    for each in settings.values():
        values.setdefault(each[key], each.get(other))
    return [values[amount] for amount in sorted(values)]


def _alone(
    axis: str, key: str, groups: Sequence[tuple[str, Sequence[Summary]]], settings: Mapping[str, Mapping[str, Any]]
) -> Iterator[Series]:
    """Series of arms that differ in nothing but this number."""
    for others, group in groups:
        same: dict[str, list[Summary]] = {}
        for each in group:
            own = settings[each.arm.arm.name]
            if _is_number(own.get(key)):
                rest = text_of({name: repr(value) for name, value in sorted(own.items()) if name != key})
                same.setdefault(rest, []).append(each)
        for alike in same.values():
            if len(alike) > 1:
                labels = ", ".join(each.arm.arm.labels[axis] for each in alike)
                yield _series(f"{others}: {labels}" if others else labels, alike, key, settings)
