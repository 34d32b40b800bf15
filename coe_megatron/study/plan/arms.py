"""The arms of a study: cross the axes, skip combinations, name the arms, and resolve each arm's config."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from coe_megatron import parsing
from coe_megatron.config import RunConfig
from coe_megatron.config.load import read_all, resolve
from coe_megatron.errors import ConfigError
from coe_megatron.study.plan.names import arm_name, joined, listed, looks_like, row_label, text_of, title
from coe_megatron.study.plan.study_file import StudySettings
from coe_megatron.text import shortened

Labels: TypeAlias = Mapping[str, str]  # by axis

_OWN = {"training.seed": "seeds", "output": "output"}  # settings that have their own key in a study file
_MAX_LABEL = 255  # bytes
_MAX_ARMS, _MAX_RUNS = 1_000, 2_000  # resolving an arm takes about 25 ms
_RESERVED_NAMES = {"report"}  # folders of a study that belong to no arm
_SEED = "{seed}"  # in training.warm_start: the run's seed, so that each seed can start from weights of its own
_SETTING = re.compile(r"[\w-]+(\.[\w-]+)*")


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
        arm: name of the arm.
        config: complete config; `output` is the run's own folder.
        overrides: the same config as `key=value` over the study's base.
    """

    arm: str
    seed: int
    config: RunConfig
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Arm:
    """One combination of labels.

    Attributes:
        name: unique name, also of its folder.
        labels: its label on each axis.
        config: config that the seeds share; `output` is the arm's folder.
        overrides: the same config as `key=value` over the study's base.
        baseline: name of the arm that it is compared with; a baseline names itself.
    """

    name: str
    labels: Labels
    config: RunConfig
    overrides: tuple[str, ...]
    baseline: str = ""

    @property
    def title(self) -> str:
        """Its labels on one line, for tables and figures."""
        return title(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all settings except output and seed; it changes if the arm changes."""
        values = asdict(self.config)
        del values["output"], values["training"]["seed"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def runs(self, seeds: Sequence[int]) -> list[Run]:
        """One run per seed, in the subfolder `seed-S` of the arm."""
        return [self._run(seed, f"{self.config.output}/seed-{seed}") for seed in seeds]

    def _run(self, seed: int, folder: str) -> Run:
        training, own = replace(self.config.training, seed=seed), [f"training.seed={seed}", override("output", folder)]
        if training.warm_start is not None and _SEED in training.warm_start:
            training = replace(training, warm_start=training.warm_start.replace(_SEED, str(seed)))
            own.append(override("training.warm_start", training.warm_start))
        config = replace(self.config, output=folder, training=training)
        return Run(self.name, seed, config, (*self.overrides, *own))


@dataclass(frozen=True)
class Study:
    """A study file, resolved.

    Attributes:
        base: OmegaConf config that all arms override.
        arms: all arms, in the order of the axes.
        baseline: one of the arms.
        skipped: labels of skipped combinations, and the reasons.
    """

    settings: StudySettings
    base: Any
    arms: list[Arm]
    baseline: Arm
    skipped: list[tuple[Labels, str]]

    @cached_property
    def runs(self) -> list[Run]:
        """All runs, arm by arm."""
        return [run for arm in self.arms for run in arm.runs(self.settings.seeds)]

    def with_setting(self, arm: Arm, key: str, value: Any) -> Arm:
        """An arm with one more setting; raises as `make_study`."""
        found = _resolve(self.settings, self.base, arm.name, arm.labels, (*arm.overrides, override(key, value)))
        return replace(found, baseline=arm.baseline)


def make_study(settings: StudySettings, overrides: Sequence[str] = ()) -> Study:
    """Cross the axes and resolve every arm.

    Args:
        overrides: `key=value` for all arms, over the file's `set`; axes override both.

    Raises:
        ConfigError: one line that names the key of the study, or the arm and its setting, and what would be valid.
    """
    axes = {name: _points(name, given) for name, given in settings.axes.items()}
    common = (*(override(key, value) for key, value in settings.set.items()), *overrides)
    _check_keys(settings, axes, overrides)
    _check_skips(settings, axes)
    _check_number(settings, axes)
    baseline = _baseline_labels(settings, axes)
    base = read_all("base", [Path(name) for name in settings.base])
    arms: list[Arm] = []
    skipped: list[tuple[Labels, str]] = []
    for name, labels in _named(_crossed(axes)):
        if (reason := _skipped(settings, labels)) is not None:
            skipped.append((labels, reason))
            continue
        settled = {key: value for axis, label in labels.items() for key, value in axes[axis][label].items()}
        own = (override(key, value) for key, value in settled.items())
        arms.append(_resolve(settings, base, name, labels, (*common, *own)))
    _check_different(arms)
    arms = [replace(arm, baseline=_baseline(baseline, arms).name) for arm in arms]
    return Study(settings, base, arms, _baseline(baseline, arms), skipped)


def override(key: str, value: Any) -> str:
    """`key=value` for a command line; text is quoted only if YAML would read something else."""
    plain = isinstance(value, str) and _reads_as_itself(value)
    return f"{key}={value if plain else json.dumps(value, ensure_ascii=False)}"


def _reads_as_itself(text: str) -> bool:
    try:
        parsing.check_yaml(text)
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"x={text}"])) == {"x": text}
    except (YAMLError, OmegaConfBaseException, ValueError):
        return False


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


def _check_keys(settings: StudySettings, axes: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Check that each key is the name of a setting, and that no setting is set twice."""
    set_by: dict[str, str] = {}
    for axis, points in axes.items():
        where = f"axes.{shortened(axis, 100)}"
        for point in points.values():
            _require_settings(where, point)
        keys = dict.fromkeys(key for point in points.values() for key in _all_keys(point))
        for key in keys:
            if other := _overlapping(key, set_by):
                raise ConfigError(f"{where} sets {key}: {set_by[other]} sets it too; put both into one axis")
        set_by |= dict.fromkeys(keys, where)
    _require_settings("set", settings.set)
    everywhere = list(_all_keys(settings.set))
    given = [re.sub(r"\[([^\[\]]*)\]", r".\1", text.partition("=")[0]) for text in overrides]
    for key in (*everywhere, *given):
        if other := _overlapping(key, set_by):
            raise ConfigError(f"{shortened(key, 100)} is set for all arms: {set_by[other]} sets it too")
    for key in (*everywhere, *given, *set_by):
        if other := _overlapping(key, _OWN):
            raise ConfigError(f"{shortened(key, 100)} is set for arms: use the study's key {_OWN[other]} instead")
    if settings.budget and (other := _overlapping(key := settings.budget.solve, (used := set_by | _OWN))):
        raise ConfigError(f"budget.solve is {key}: {used[other]} sets it already; solve for another setting")


def _all_keys(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The full names of all settings; nested mappings are flattened."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _all_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _require_settings(where: str, given: Mapping[str, Any]) -> None:
    """Check that keys are names; other text could be read as another setting, or as a value."""
    for key in map(str, given):
        if not _SETTING.fullmatch(key):
            raise ConfigError(f"{where} has {shortened(key, 100)!r}: it must be a setting's name, such as moe.topk")


def _overlapping(key: str, others: Mapping[str, str]) -> str | None:
    """The first of the other settings that equals, contains or is contained in this one."""
    found = (each for each in others if f"{each}.".startswith(f"{key}.") or f"{key}.".startswith(f"{each}."))
    return next(found, None)


def _check_number(settings: StudySettings, axes: Mapping[str, Any]) -> None:
    """Check the number of arms and runs before crossing the axes."""
    arms = math.prod(map(len, axes.values()))
    if arms > _MAX_ARMS:
        raise ConfigError(f"axes give more than {_MAX_ARMS:,} arms: divide them among several studies")
    if arms * len(settings.seeds) > _MAX_RUNS:
        raise ConfigError(f"seeds and axes give more than {_MAX_RUNS:,} runs: divide them among several studies")


def _named(crossed: Iterator[dict[str, str]]) -> Iterator[tuple[str, dict[str, str]]]:
    """Combinations with their folder names, which do not depend on skipped or later combinations."""
    used = set(_RESERVED_NAMES)
    for labels in crossed:
        name = arm_name(list(labels.values()), used)
        used.add(name)
        yield name, labels


def _crossed(axes: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    for labels in itertools.product(*axes.values()):
        yield dict(zip(axes, labels, strict=True))


def _skipped(settings: StudySettings, labels: Labels) -> str | None:
    """The reason why a combination is skipped; None if it is not."""
    for skip in settings.skip:
        if all(labels.get(axis) in _labels(wanted) for axis, wanted in skip.where.items()):
            return skip.reason
    return None


def _check_skips(settings: StudySettings, axes: Mapping[str, Mapping[str, Any]]) -> None:
    for number, skip in enumerate(settings.skip):
        if not skip.where:
            raise ConfigError(f"skip.{number}.where is {{}}: it would skip every arm; name labels of axes")
        for axis, wanted in skip.where.items():
            for label in _labels(wanted):
                _require_label(f"skip.{number}.where", axes, axis, label)


def _baseline_labels(settings: StudySettings, axes: Mapping[str, Mapping[str, Any]]) -> Labels:
    wanted = {axis: text_of(label) for axis, label in settings.baseline.items()}
    for axis, label in wanted.items():
        _require_label("baseline", axes, axis, label)
    if missing := [axis for axis in axes if axis not in wanted]:
        raise ConfigError(f"baseline.{missing[0]} is missing: it must be one of {listed(axes[missing[0]])}")
    return wanted


def _baseline(wanted: Labels, arms: Sequence[Arm]) -> Arm:
    found = next((arm for arm in arms if arm.labels == wanted), None)
    if found is None:
        raise ConfigError(f"baseline is {joined(wanted)}: skip excludes that arm")
    return found


def _require_label(where: str, axes: Mapping[str, Mapping[str, Any]], axis: str, label: str) -> None:
    if axis not in axes:
        raise ConfigError(f"{where}.{shortened(axis, 100)} is not an axis; the axes are {listed(axes)}")
    if label not in axes[axis]:
        raise ConfigError(f"{where}.{axis} is {shortened(label, 100)!r}: it must be one of {listed(axes[axis])}")


def _check_different(arms: Sequence[Arm]) -> None:
    if not arms:
        raise ConfigError("skip excludes every arm")
    first: dict[str, Arm] = {}
    for arm in arms:
        if (other := first.setdefault(arm.fingerprint, arm)) is not arm:
            raise ConfigError(f"arms {other.name} and {arm.name} have the same settings: exclude one with skip")


def _resolve(settings: StudySettings, base: Any, name: str, labels: Labels, overrides: tuple[str, ...]) -> Arm:
    folder = f"{settings.output}/{name}"
    own = (f"training.seed={settings.seeds[0]}", override("output", folder))
    try:
        return Arm(name, labels, resolve(base, (*overrides, *own)), overrides)
    except ConfigError as error:
        raise ConfigError(f"arm {name}: {error}") from None


def _labels(wanted: Any) -> list[str]:
    return list(map(text_of, wanted if isinstance(wanted, list) else [wanted]))
