"""The axes of a study: labels with their settings, combined; which combinations are skipped, and what each is compared
with.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from coe_megatron.errors import ConfigError
from coe_megatron.study.plan.ladder import ladder_axes
from coe_megatron.study.plan.names import arm_name, joined, listed, looks_like, row_label, text_of
from coe_megatron.study.plan.study_file import Skip, StudySettings
from coe_megatron.text import shortened

Labels: TypeAlias = Mapping[str, str]  # by axis
Axes: TypeAlias = Mapping[str, Mapping[str, Mapping[str, Any]]]  # axis -> label -> settings

_MAX_LABEL = 255  # bytes
_RESERVED_NAMES = {"report"}  # folders of a study that belong to no arm


def read_axes(settings: StudySettings) -> dict[str, dict[str, dict[str, Any]]]:
    """The labels of every axis, each with its settings.

    Raises:
        ConfigError: an axis is not valid; one line that names it.
    """
    axes = {name: _points(name, given) for name, given in settings.axes.items()}
    if settings.ladder is None:
        return axes
    own = ladder_axes(settings.ladder)
    if both := [name for name in own if name in axes]:
        raise ConfigError(f"axes.{both[0]} is an axis of the ladder: give it another name")
    return axes | {name: {label: {} for label in labels} for name, labels in own.items()}


def check_labels(settings: StudySettings, axes: Axes) -> None:
    """Check that `skip` and `baseline` name labels of the axes.

    Raises:
        ConfigError: one line that names the key, and the labels that there are.
    """
    for number, skip in enumerate(settings.skip):
        if not skip.where:
            raise ConfigError(f"skip.{number}.where is {{}}: it would skip every arm; name labels of axes")
        for axis, wanted in skip.where.items():
            for label in _labels(wanted):
                _require_label(f"skip.{number}.where", axes, axis, label)
        for axis, label in (skip.use or {}).items():
            _require_label(f"skip.{number}.use", axes, axis, text_of(label))
    for axis, label in (pattern := _pattern(settings)).items():
        _require_label("baseline", axes, axis, label)
    if not pattern:
        raise ConfigError(f"baseline names no label: give it a label of at least one axis; the axes are {listed(axes)}")


def named(crossed: Iterator[dict[str, str]]) -> Iterator[tuple[str, dict[str, str]]]:
    """Combinations with their folder names, which do not depend on skipped or later combinations."""
    used = set(_RESERVED_NAMES)
    for labels in crossed:
        name = arm_name(list(labels.values()), used)
        used.add(name)
        yield name, labels


def crossed(axes: Axes) -> Iterator[dict[str, str]]:
    for labels in itertools.product(*axes.values()):
        yield dict(zip(axes, labels, strict=True))


def matching_skip(settings: StudySettings, labels: Labels) -> Skip | None:
    """The first entry of `skip` that excludes a combination; None if it is kept."""
    for skip in settings.skip:
        if all(labels.get(axis) in _labels(wanted) for axis, wanted in skip.where.items()):
            return skip
    return None


def baselines(settings: StudySettings, arms: Mapping[str, Labels]) -> dict[str, str]:
    """The name of the arm that each arm is compared with; a baseline names itself.

    The baseline of an arm has the labels of `baseline`, and the arm's own on all other axes. If that combination is
    skipped, the arm that the skip's `use` names stands in for it.

    Raises:
        ConfigError: a stratum has no baseline; one line that says what to add.
    """
    names = {tuple(labels.items()): name for name, labels in arms.items()}
    found = {name: _baseline(settings, names, name, labels) for name, labels in arms.items()}
    for name, baseline in found.items():
        if found[baseline] != baseline:
            raise ConfigError(
                f"baseline of {name} is {baseline}, which is compared with {found[baseline]} itself: let `use` of skip "
                "keep the labels of baseline"
            )
    return found


def _baseline(settings: StudySettings, names: Mapping[tuple, str], name: str, labels: Labels) -> str:
    pattern = _pattern(settings)
    wanted = {axis: pattern.get(axis, label) for axis, label in labels.items()}
    if (baseline := names.get(tuple(wanted.items()))) is not None:
        return baseline
    skip = matching_skip(settings, wanted)
    assert skip is not None
    if skip.use is None:
        others = f" of {name}" if len(pattern) < len(labels) else ""
        raise ConfigError(
            f"baseline{others} is {joined(wanted)}: skip excludes that arm; give that skip a `use`, the labels in "
            "which the arm that stands in for it differs"
        )
    used = wanted | {axis: text_of(label) for axis, label in skip.use.items()}
    if (baseline := names.get(tuple(used.items()))) is None:
        raise ConfigError(f"skip uses {joined(used)} instead of {joined(wanted)}: skip excludes that arm too")
    return baseline


def _pattern(settings: StudySettings) -> dict[str, str]:
    """The labels that all baselines have, by axis."""
    return {axis: text_of(label) for axis, label in settings.baseline.items() if label is not None}


def _require_label(where: str, axes: Axes, axis: str, label: str) -> None:
    if axis not in axes:
        raise ConfigError(f"{where}.{shortened(axis, 100)} is not an axis; the axes are {listed(axes)}")
    if label not in axes[axis]:
        raise ConfigError(f"{where}.{axis} is {shortened(label, 100)!r}: it must be one of {listed(axes[axis])}")


def _points(name: str, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The labels of an axis, each with its settings."""
    where = f"axes.{shortened(name, 100)}"
    if not given:
        raise ConfigError(f"{where} is empty: provide labels, or settings with lists of values")
    values = list(given.values())
    if all(isinstance(value, dict) for value in values):
        points = {label: dict(settings) for label, settings in given.items()}
    elif all(isinstance(value, list) and value for value in values):
        points = _zipped(where, given)
    else:
        raise ConfigError(f"{where} must map either labels to settings, or settings to lists of values")
    _check_labels(where, points)
    return points


def _zipped(where: str, given: Mapping[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """The points of an axis of lists: the first values of all lists, then the second values, and so on."""
    lengths = {key: len(value) for key, value in given.items()}
    if len(set(lengths.values())) > 1:
        details = ", ".join(f"{key} has {length}" for key, length in list(lengths.items())[:20])
        raise ConfigError(f"{where}: {details} values: lists of one axis must have the same length")
    points: dict[str, dict[str, Any]] = {}
    for row in zip(*given.values(), strict=True):
        if (label := row_label(row)) in points:
            raise ConfigError(f"{where} has the same values twice: {shortened(label, 100)}")
        points[label] = dict(zip(given, row, strict=True))
    return points


def _check_labels(where: str, points: Mapping[str, Any]) -> None:
    """Check that no label is empty, longer than a file name, or looks like another label."""
    seen: dict[str, str] = {}
    for label in points:
        if not label.strip():
            raise ConfigError(f"{where} has the label {label!r}: a label must have visible text")
        if (size := len(label.encode(errors="replace"))) > _MAX_LABEL:
            details = f"a label of {size} bytes ({shortened(label, 30)!a}): it must have at most {_MAX_LABEL}"
            raise ConfigError(f"{where} has {details}")
        if (other := seen.setdefault(looks_like(label), label)) != label:
            details = " and ".join(ascii(shortened(each, 100)) for each in (other, label))
            raise ConfigError(f"{where} has the labels {details}: they look the same")


def _labels(wanted: Any) -> list[str]:
    return list(map(text_of, wanted if isinstance(wanted, list) else [wanted]))
