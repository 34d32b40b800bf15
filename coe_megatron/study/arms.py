"""From a study file to its arms: axes crossed, combinations left out, names given, and each arm's config resolved."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from omegaconf import OmegaConf

from coe_megatron.config import RunConfig
from coe_megatron.config.load import merge, read, resolve
from coe_megatron.errors import ConfigError
from coe_megatron.study.settings import StudySettings

Labels: TypeAlias = Mapping[str, str]  # by axis

_OWN = {"training.seed": "seeds", "output": "output"}  # settings that a study decides by a key of its own


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
        arm: its name.
        config: whole; `output` is the run's own folder.
        overrides: the same as `key=value` over the study's base.
    """

    arm: str
    seed: int
    config: RunConfig
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Arm:
    """One combination of labels.

    Attributes:
        name: of its folder; no other arm has it.
        labels: by axis.
        config: as the seeds share it; `output` is the arm's folder.
        overrides: the same as `key=value` over the study's base.
    """

    name: str
    labels: Labels
    config: RunConfig
    overrides: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        """Of all settings but output and seed: another one means that the arm is no longer what it was."""
        values = asdict(self.config)
        del values["output"], values["training"]["seed"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def runs(self, seeds: Sequence[int]) -> list[Run]:
        """Once with each seed, in a folder `seed-S` of the arm's."""
        return [self._run(seed, f"{self.config.output}/seed-{seed}") for seed in seeds]

    def _run(self, seed: int, folder: str) -> Run:
        config = replace(self.config, output=folder, training=replace(self.config.training, seed=seed))
        return Run(self.name, seed, config, (*self.overrides, f"training.seed={seed}", override("output", folder)))


@dataclass(frozen=True)
class Study:
    """A study file, resolved.

    Attributes:
        base: what all arms are overrides of, as OmegaConf holds it.
        arms: in the order of the axes.
        baseline: one of them.
        skipped: combinations that are left out, and why.
    """

    settings: StudySettings
    base: Any
    arms: list[Arm]
    baseline: Arm
    skipped: list[tuple[Labels, str]]

    @property
    def runs(self) -> list[Run]:
        """Arm by arm."""
        return [run for arm in self.arms for run in arm.runs(self.settings.seeds)]

    def with_setting(self, arm: Arm, key: str, value: Any) -> Arm:
        """An arm with one setting more; raises as `make_study`."""
        return _resolve(self.settings, self.base, arm.labels, (*arm.overrides, override(key, value)))


def make_study(settings: StudySettings, overrides: Sequence[str] = ()) -> Study:
    """Cross the axes and resolve every arm.

    Args:
        overrides: `key=value` of all arms, over the file's `set`; what an axis says wins over both.

    Raises:
        ConfigError: one line that names the key of the study, or the arm and its setting, and what would be valid.
    """
    axes = {name: _points(name, given) for name, given in settings.axes.items()}
    common = (*(override(key, value) for key, value in settings.set.items()), *overrides)
    _check_keys(settings, axes, common)
    base = merge("base", *(read(Path(name)) for name in settings.base))
    arms: list[Arm] = []
    skipped: list[tuple[Labels, str]] = []
    for labels in _crossed(axes):
        if reason := _skipped(settings, labels):
            skipped.append((labels, reason))
            continue
        settled = {key: value for axis, label in labels.items() for key, value in axes[axis][label].items()}
        own = (override(key, value) for key, value in settled.items())
        arms.append(_resolve(settings, base, labels, (*common, *own)))
    _check_skips(settings, axes)
    _check_different(arms)
    return Study(settings, base, arms, _baseline(settings, axes, arms), skipped)


def override(key: str, value: Any) -> str:
    """`key=value` as a command line takes it; text is quoted only where YAML would read something else."""
    if isinstance(value, str) and OmegaConf.to_container(OmegaConf.from_dotlist([f"x={value}"])) == {"x": value}:
        return f"{key}={value}"
    return f"{key}={json.dumps(value)}"


def slug(label: str) -> str:
    """A label as a part of a file's name: `MoE(8/64)` becomes `moe-8-64`."""
    return re.sub(r"[^a-z0-9.+]+", "-", label.lower()).strip("-.")


def _points(name: str, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The labels of an axis, each with its settings."""
    where = f"axes.{name}"
    if not given:
        raise ConfigError(f"{where} is empty: it needs labels, or settings with lists of values")
    values = list(given.values())
    if all(isinstance(value, dict) for value in values):
        points = {str(label): dict(settings) for label, settings in given.items()}
    elif all(isinstance(value, list) and value for value in values):
        lengths = {key: len(value) for key, value in given.items()}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{key} has {length}" for key, length in lengths.items())
            raise ConfigError(f"{where}: {listed} values: lists of one axis must be equally long")
        rows = [dict(zip(given, row, strict=True)) for row in zip(*values, strict=True)]
        points = {", ".join(map(_text, row.values())): row for row in rows}
        if len(points) < len(rows):
            raise ConfigError(f"{where} has the same values twice: {', '.join(map(_text, values[0]))}")
    else:
        raise ConfigError(f"{where} must map labels to settings, or settings to lists of values, and nothing else")
    _check_names(where, points)
    return points


def _check_names(where: str, points: Mapping[str, Any]) -> None:
    named: dict[str, str] = {}
    for label in points:
        if not slug(label):
            raise ConfigError(f"{where} has the label {label!r}: it needs a letter or a digit, to name folders")
        if (other := named.setdefault(slug(label), label)) != label:
            raise ConfigError(f"{where} has the labels {other!r} and {label!r}: both would name a folder {slug(label)}")


def _check_keys(settings: StudySettings, axes: Mapping[str, Any], common: Sequence[str]) -> None:
    """No setting is decided twice."""
    decided: dict[str, str] = {}
    for axis, points in axes.items():
        for key in dict.fromkeys(key for point in points.values() for key in point):
            if key in decided:
                raise ConfigError(f"axes.{axis} sets {key}: axes.{decided[key]} does so too; put both into one axis")
            decided[key] = axis
    everywhere = [text.partition("=")[0] for text in common]
    for key in everywhere:
        if key in decided:
            raise ConfigError(f"{key} is set for all arms: axes.{decided[key]} decides it")
    for key in (*everywhere, *decided):
        if key in _OWN:
            raise ConfigError(f"{key} is set for arms: the study's key {_OWN[key]} decides it")
    if settings.budget and settings.budget.solve in {*decided, *_OWN}:
        where = f"axes.{decided[key]}" if (key := settings.budget.solve) in decided else _OWN[key]
        raise ConfigError(f"budget.solve is {key}: {where} decides it already; solve for another setting")


def _crossed(axes: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    for labels in itertools.product(*axes.values()):
        yield dict(zip(axes, labels, strict=True))


def _skipped(settings: StudySettings, labels: Labels) -> str | None:
    """The reason why a combination is left out, if it is."""
    for skip in settings.skip:
        if all(labels.get(axis) in _labels(wanted) for axis, wanted in skip.where.items()):
            return skip.reason
    return None


def _check_skips(settings: StudySettings, axes: Mapping[str, Mapping[str, Any]]) -> None:
    for number, skip in enumerate(settings.skip):
        if not skip.where:
            raise ConfigError(f"skip.{number}.where is {{}}: it would leave out every arm; name labels of axes")
        for axis, wanted in skip.where.items():
            for label in _labels(wanted):
                _require_label(f"skip.{number}.where", axes, axis, label)


def _baseline(settings: StudySettings, axes: Mapping[str, Mapping[str, Any]], arms: Sequence[Arm]) -> Arm:
    wanted = {axis: _text(label) for axis, label in settings.baseline.items()}
    for axis, label in wanted.items():
        _require_label("baseline", axes, axis, label)
    if missing := [axis for axis in axes if axis not in wanted]:
        raise ConfigError(f"baseline.{missing[0]} is missing: it must be one of {', '.join(axes[missing[0]])}")
    found = next((arm for arm in arms if arm.labels == wanted), None)
    if found is None:
        raise ConfigError(f"baseline is {', '.join(wanted.values())}: skip leaves that arm out")
    return found


def _require_label(where: str, axes: Mapping[str, Mapping[str, Any]], axis: str, label: str) -> None:
    if axis not in axes:
        raise ConfigError(f"{where}.{axis} is no axis; the axes are {', '.join(axes)}")
    if label not in axes[axis]:
        raise ConfigError(f"{where}.{axis} is {label!r}: it must be one of {', '.join(axes[axis])}")


def _check_different(arms: Sequence[Arm]) -> None:
    if not arms:
        raise ConfigError("skip leaves out every arm")
    first: dict[str, Arm] = {}
    for arm in arms:
        if (other := first.setdefault(arm.fingerprint, arm)) is not arm:
            raise ConfigError(f"arms {other.name} and {arm.name} have the same settings: leave one out with skip")


def _resolve(settings: StudySettings, base: Any, labels: Labels, overrides: tuple[str, ...]) -> Arm:
    name = "_".join(map(slug, labels.values()))
    folder = f"{settings.output}/{name}"
    own = (f"training.seed={settings.seeds[0]}", override("output", folder))
    try:
        return Arm(name, labels, resolve(base, (*overrides, *own)), overrides)
    except ConfigError as error:
        raise ConfigError(f"arm {name}: {error}") from None


def _labels(wanted: Any) -> list[str]:
    return list(map(_text, wanted if isinstance(wanted, list) else [wanted]))


def _text(value: Any) -> str:
    """A value as YAML has it."""
    return value if isinstance(value, str) else json.dumps(value)
