"""The study file: what is compared, with which seeds, and what is held equal meanwhile."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import Field

from coe_megatron.config.load import check_references, parse_as, plain, read
from coe_megatron.config.packaged import find
from coe_megatron.config.settings import Count, Index, PathText
from coe_megatron.errors import ConfigError
from coe_megatron.files import expand_user
from coe_megatron.study.plan.names import text_of
from coe_megatron.text import shortened

_MOST_BASES = 64
Quantity = Literal["expert_compute", "flops", "parameters", "memory", "wall_clock"]


@dataclass(frozen=True)
class Skip:
    """Arms that are left out.

    Attributes:
        where: a label, or a list of labels, of each axis named; of other axes any label.
        reason: why; the plan shows it.
    """

    where: dict[str, Any]
    reason: str


@dataclass(frozen=True)
class Budget:
    """What all arms have equal to the baseline, and the setting that is solved for it, arm by arm.

    Attributes:
        equal: of a whole run: `expert_compute`, FLOPs of routed and shared experts; `flops`, all FLOPs of training;
            `parameters` of the model; `memory`, bytes of a rank; `wall_clock`, seconds estimated on the device.
        solve: a setting that is a whole number, such as `training.steps`.
        range: its smallest and its largest value.
        multiple_of: it shall be a multiple of this.
        tolerance: an arm that comes no nearer than this share of the baseline's amount is refused, or where that is
            less, this share of what the amount changes by from one end of `range` to the other.
    """

    equal: Quantity
    solve: str
    range: tuple[Count, Count]
    multiple_of: Count = 1
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.02


@dataclass(frozen=True)
class StudySettings:
    """A study file, whole.

    Attributes:
        base: run configs, of several the later wins.
        output: folder of the study.
        axes: by name; each either maps labels to settings (`MoE(8/64): {chain.iterations: 1, moe.topk: 8}`), or
            settings to lists of values, of which the first belong together, then the second (`moe.topk: [4, 8]`).
        baseline: the arm that others are held against: a label of every axis.
        seeds: of `training.seed`; every arm runs once with each.
        set: settings of all arms, over those of `base`.
        skip: combinations of labels that are no arm.
        budget: what is held equal; null for nothing.
        device: on which hours are estimated, and whose memory the arms must fit; a name of `estimate.devices`.
    """

    base: list[str]
    output: PathText
    axes: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    baseline: dict[str, Any]
    seeds: Annotated[list[Index], Field(min_length=1)]
    set: dict[str, Any] = field(default_factory=dict)
    skip: list[Skip] = field(default_factory=list)
    budget: Budget | None = None
    device: str | None = None


def read_study(path: Path) -> StudySettings:
    """Read a study file.

    The key `base_study` names one study file or a list of them, relative to this one, whose settings hold where this
    one says nothing; so a study of other sizes need not repeat its axes. Paths in `base` are relative to the file in
    which they stand.

    Raises:
        ConfigError: one line that names the key, its value and what would be valid.
    """
    values = plain(read(path, key="base_study", prepare=_with_paths), str(path))
    settings = parse_as(StudySettings, _with_labels(values))
    if len(set(settings.seeds)) < len(settings.seeds):
        raise ConfigError(f"seeds is {shortened(str(settings.seeds), 100)}: each must be another")
    if (budget := settings.budget) and budget.range[0] > budget.range[1]:
        raise ConfigError(f"budget.range is {list(budget.range)}: its first number must be the smaller one")
    return settings


def _with_labels(values: dict[str, Any]) -> dict[str, Any]:
    """Names of axes and labels as text, also where YAML reads a number; what else is wrong is told later."""
    found = dict(values)
    for key in ("axes", "baseline"):
        found |= {key: _text_keys(key, values[key])} if key in values else {}
    if isinstance(axes := found.get("axes"), Mapping):
        found["axes"] = {axis: _text_keys(f"axes.{axis}", points) for axis, points in axes.items()}
    if isinstance(skips := values.get("skip"), list):
        found["skip"] = [
            skip | {"where": _text_keys(f"skip.{number}.where", skip["where"])} if _has(skip, "where") else skip
            for number, skip in enumerate(skips)
        ]
    return found


def _has(value: Any, key: str) -> bool:
    return isinstance(value, Mapping) and key in value


def _text_keys(where: str, given: Any) -> Any:
    if not isinstance(given, Mapping):
        return given
    found = {text_of(key): value for key, value in given.items()}
    if len(found) < len(given):
        twice = next(key for key in given if not isinstance(key, str))
        raise ConfigError(f"{shortened(where, 100)} has {text_of(twice)} twice, as text and as something else")
    return found


def _with_paths(path: Path, values: Any) -> Any:
    """The `base` of a file, as paths from here."""
    if "base" in values:
        check_references(OmegaConf.to_container(values), str(path))
        given = values["base"]
        names = [given] if isinstance(given, str) else list(given) if OmegaConf.is_list(given) else None
        if not names or not all(isinstance(name, str) and name for name in names):
            said = shortened(repr(given), 100)
            raise ConfigError(f"{path}: base is {said}: it must name a run config or a list of them")
        if len(set(names)) < len(names) or len(names) > _MOST_BASES:
            raise ConfigError(f"{path}: base is {shortened(str(given), 100)}: at most {_MOST_BASES} files, none twice")
        values["base"] = [str(find(Path(expand_user(name)), path.parent)) for name in names]
    return values
