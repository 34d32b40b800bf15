"""The arms of a study: cross the axes, skip combinations, name the arms, and resolve each arm's config."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from coe_megatron import parsing
from coe_megatron.config import RunConfig
from coe_megatron.config.change import with_setting
from coe_megatron.config.load import read_all, resolve
from coe_megatron.errors import ConfigError
from coe_megatron.study.plan.axes import Axes, Labels, baselines, check_labels, crossed, matching_skip, named, read_axes
from coe_megatron.study.plan.ladder import WIDTH, Rule, label_of, settings_of
from coe_megatron.study.plan.names import title
from coe_megatron.study.plan.study_file import RunSeed, StudySettings, Tune
from coe_megatron.text import shortened

_OWN = {
    "training.seed": "seeds",
    "training.data_seed": "seeds",
    "output": "output",
}  # settings that have their own key in a study file
_MAX_ARMS, _MAX_RUNS = 1_000, 2_000  # resolving an arm takes about 25 ms
_SEED = "{seed}"  # in training.warm_start and branch_from: the seed that names the run
_SETTING = re.compile(r"[\w-]+(\.[\w-]+)*")


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
        arm: name of the arm.
        seed: the seed that names its folder, and by which runs are paired.
        config: complete config; `output` is the run's own folder.
        overrides: the same config as `key=value` over the study's base.
        tuned: in a tuning run the setting and its value, such as `optimizer.lr 0.002`; otherwise empty.
    """

    arm: str
    seed: int
    config: RunConfig
    overrides: tuple[str, ...]
    tuned: str = ""

    @property
    def title(self) -> str:
        """What distinguishes it from other runs of the study, for messages."""
        return ", ".join(filter(None, [self.arm, self.tuned, f"seed {self.seed}"]))


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
    baseline: str

    @property
    def title(self) -> str:
        """Its labels on one line, for tables and figures."""
        return title(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all settings except output and seeds; it changes if the arm changes."""
        values = asdict(self.config)
        del values["output"], values["training"]["seed"], values["training"]["data_seed"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def is_baseline(self) -> bool:
        """Whether it is compared with no other arm."""
        return self.baseline == self.name

    def runs(self, seeds: Sequence[RunSeed], folder: str = "", tuned: str = "") -> list[Run]:
        """One run per seed, in the subfolder `seed-S` of the arm, or of a `folder` in it; for `tuned` see `Run`."""
        within = f"{self.config.output}/{folder}" if folder else self.config.output
        return [self._run(seed, f"{within}/seed-{seed.name}", tuned) for seed in seeds]

    def _run(self, seed: RunSeed, folder: str, tuned: str) -> Run:
        training = replace(self.config.training, seed=seed.weights, data_seed=seed.data)
        own = [f"training.seed={seed.weights}", override("output", folder)]
        if training.data_seed != self.config.training.data_seed:
            own.append(override("training.data_seed", seed.data))
        for key in ("warm_start", "branch_from"):
            if _SEED in (source := getattr(training, key) or ""):
                training = with_setting(training, key, source.replace(_SEED, str(seed.name)))
                own.append(override(f"training.{key}", getattr(training, key)))
        config = replace(self.config, output=folder, training=training)
        return Run(self.name, seed.name, config, (*self.overrides, *own), tuned)


@dataclass(frozen=True)
class Study:
    """A study file, resolved.

    Attributes:
        base: OmegaConf config that all arms override.
        arms: all arms, in the order of the axes.
        skipped: labels of skipped combinations, and the reasons.
        rule: of a ladder; None without.
    """

    settings: StudySettings
    base: Any
    arms: list[Arm]
    skipped: list[tuple[Labels, str]]
    rule: Rule | None = None

    @cached_property
    def runs(self) -> list[Run]:
        """All runs of the comparison, arm by arm."""
        return [run for arm in self.arms for run in arm.runs(self.settings.run_seeds)]

    @property
    def baseline(self) -> Arm:
        """The first arm that is a baseline; the only one, unless the study is divided into strata."""
        return next(arm for arm in self.arms if arm.is_baseline)

    def arm(self, name: str) -> Arm:
        """The arm of a name."""
        return next(arm for arm in self.arms if arm.name == name)

    def with_settings(self, arm: Arm, values: Mapping[str, Any]) -> Arm:
        """An arm with more settings; raises as `make_study`."""
        overrides = (*arm.overrides, *(override(key, value) for key, value in values.items()))
        return replace(arm, config=_resolve(self.settings, self.base, arm.name, overrides), overrides=overrides)


def largest_arms(study: Study) -> set[str]:
    """Names of the arms of a ladder's largest width; empty without a ladder."""
    if (ladder := study.settings.ladder) is None:
        return set()
    return {arm.name for arm in study.arms if arm.labels[WIDTH] == label_of(ladder.widths[-1])}


def make_study(settings: StudySettings, overrides: Sequence[str] = ()) -> Study:
    """Cross the axes and resolve every arm.

    Args:
        overrides: `key=value` for all arms, over the file's `set`; axes override both.

    Raises:
        ConfigError: one line that names the key of the study, or the arm and its setting, and what would be valid.
    """
    axes = read_axes(settings)
    _check_keys(settings, axes, overrides)
    _check_number(settings, axes)
    check_labels(settings, axes)
    combinations = dict(named(crossed(axes)))
    skips = {name: matching_skip(settings, labels) for name, labels in combinations.items()}
    kept = {name: labels for name, labels in combinations.items() if skips[name] is None}
    if not kept:
        raise ConfigError("skip excludes every arm")
    compared = baselines(settings, kept)
    base = read_all("base", [Path(name) for name in settings.base])
    common = (*(override(key, value) for key, value in settings.set.items()), *overrides)
    rule = None if settings.ladder is None else Rule(settings.ladder, resolve(base, common))
    folders = {tuple(labels.items()): f"{settings.output}/{name}" for name, labels in combinations.items()}
    arms = []
    for name, labels in kept.items():
        settled = {} if rule is None else rule.settings(labels, lambda other: folders[tuple(other.items())])
        settled |= {key: value for axis, label in labels.items() for key, value in axes[axis][label].items()}
        given = (*common, *(override(key, value) for key, value in settled.items()))
        arms.append(Arm(name, labels, _resolve(settings, base, name, given), given, compared[name]))
    _check_different(arms)
    return Study(
        settings, base, arms, [(combinations[name], skip.reason) for name, skip in skips.items() if skip], rule
    )


def override(key: str, value: Any) -> str:
    """`key=value` for a command line; text is quoted only if YAML would read something else."""
    plain = isinstance(value, str) and _reads_as_itself(value)
    return f"{key}={value if plain else json.dumps(value, ensure_ascii=False)}"


@lru_cache(maxsize=1 << 12)
def _reads_as_itself(text: str) -> bool:
    try:
        parsing.check_yaml(text)
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"x={text}"])) == {"x": text}
    except (YAMLError, OmegaConfBaseException, ValueError):
        return False


def _check_keys(settings: StudySettings, axes: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Check that each key is the name of a setting, and that no setting is set twice."""
    set_by = dict.fromkeys(settings_of(settings.ladder), "ladder") if settings.ladder else {}
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
    for key in (*everywhere, *given):  # which a ladder scales
        if (other := _overlapping(key, set_by)) and set_by[other] != "ladder":
            raise ConfigError(f"{shortened(key, 100)} is set for all arms: {set_by[other]} sets it too")
    for key in (*everywhere, *given, *set_by):
        if other := _overlapping(key, _OWN):
            raise ConfigError(f"{shortened(key, 100)} is set for arms: use the study's key {_OWN[other]} instead")
    if settings.budget and (other := _overlapping(key := settings.budget.solve, (used := set_by | _OWN))):
        raise ConfigError(f"budget.solve is {key}: {used[other]} sets it already; solve for another setting")
    if settings.tune:
        common = dict.fromkeys((*everywhere, *given), "the setting of all arms")
        common |= {settings.budget.solve: "budget.solve"} if settings.budget else {}
        _check_tuned(settings.tune, set_by | _OWN, common)


def _check_tuned(tune: Tune, used: dict[str, str], common: dict[str, str]) -> None:
    """Check that nothing else sets what tuning sets; `tune.set` may override `common`: what is the same in all arms, or
    solved for a budget.
    """
    _require_settings("tune.setting", [key := tune.setting])
    _require_settings("tune.set", tune.set)
    if other := _overlapping(key, all_used := common | used):
        raise ConfigError(f"tune.setting is {shortened(key, 100)}: {all_used[other]} sets it already")
    for own in _all_keys(tune.set):
        if other := _overlapping(own, forbidden := used | {key: "tune.setting"}):
            raise ConfigError(f"tune.set sets {shortened(own, 100)}: {forbidden[other]} sets it already")


def _all_keys(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The full names of all settings; nested mappings are flattened."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _all_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _require_settings(where: str, given: Iterable[Any]) -> None:
    """Check that keys are names; other text could be read as another setting, or as a value."""
    for key in map(str, given):
        if not _SETTING.fullmatch(key):
            raise ConfigError(f"{where} has {shortened(key, 100)!r}: it must be a setting's name, such as moe.topk")


def _overlapping(key: str, others: Mapping[str, str]) -> str | None:
    """The first of the other settings that equals, contains or is contained in this one."""
    found = (each for each in others if f"{each}.".startswith(f"{key}.") or f"{key}.".startswith(f"{each}."))
    return next(found, None)


def _check_number(settings: StudySettings, axes: Axes) -> None:
    """Check the number of arms and runs before crossing the axes."""
    arms, tune = math.prod(map(len, axes.values())), settings.tune
    if arms > _MAX_ARMS:
        raise ConfigError(f"axes give more than {_MAX_ARMS:,} arms: divide them among several studies")
    runs_of_arm = len(settings.seeds) + (len(tune.values) * len(tune.seeds) if tune else 0)
    if arms * runs_of_arm > _MAX_RUNS:
        raise ConfigError(f"seeds and axes give more than {_MAX_RUNS:,} runs: divide them among several studies")


def _check_different(arms: Sequence[Arm]) -> None:
    first: dict[str, Arm] = {}
    for arm in arms:
        if (other := first.setdefault(arm.fingerprint, arm)) is not arm:
            raise ConfigError(f"arms {other.name} and {arm.name} have the same settings: exclude one with skip")


def _resolve(settings: StudySettings, base: Any, name: str, overrides: tuple[str, ...]) -> RunConfig:
    own = (f"training.seed={settings.run_seeds[0].weights}", override("output", f"{settings.output}/{name}"))
    try:
        return resolve(base, (*overrides, *own))
    except ConfigError as error:
        raise ConfigError(f"arm {name}: {error}") from None
