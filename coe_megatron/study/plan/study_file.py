"""The study file: what is compared, with which seeds, and what is held equal."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import Field

from coe_megatron.config.load import check_references, parse_as, plain, read
from coe_megatron.config.packaged import find
from coe_megatron.config.settings import Count, Index, PathText, Positive
from coe_megatron.errors import ConfigError
from coe_megatron.files import expand_user
from coe_megatron.study.plan.names import text_of
from coe_megatron.text import shortened

_MAX_BASES = 64
Quantity = Literal["expert_compute", "flops", "parameters", "memory", "wall_clock"]


@dataclass(frozen=True)
class Skip:
    """Combinations that are skipped.

    Attributes:
        where: a label, or a list of labels, for each named axis; other axes match any label.
        reason: the reason, which the plan shows.
    """

    where: dict[str, Any]
    reason: str


@dataclass(frozen=True)
class Budget:
    """The quantity that is equal in all arms, and the setting that is solved for it in each arm.

    Attributes:
        equal: total of a run: `expert_compute`, FLOPs of routed and shared experts; `flops`, all training FLOPs;
            `parameters` of the model; `memory`, bytes per rank; `wall_clock`, predicted seconds on the device.
        solve: an integer setting, such as `training.steps`.
        range: its minimum and maximum.
        multiple_of: it must be a multiple of this.
        tolerance: maximum deviation, relative to the baseline's amount, or to the change of the amount over `range`
            if that is less; an arm with a larger deviation is refused.
    """

    equal: Quantity
    solve: str
    range: tuple[Count, Count]
    multiple_of: Count = 1
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.02


@dataclass(frozen=True)
class StudySettings:
    """A complete study file.

    Attributes:
        base: run configs; later ones override earlier ones.
        output: folder of the study.
        axes: axes by name; an axis maps either labels to settings (`MoE(8/64): {chain.iterations: 1, moe.topk: 8}`),
            or settings to lists of values, which are zipped (`moe.topk: [4, 8]`).
        baseline: the arm that others are compared with: a label for every axis.
        seeds: values of `training.seed`; every arm runs once with each.
        set: settings for all arms, which override `base`.
        skip: combinations of labels to skip.
        budget: what is held equal; null for nothing.
        device: the device for predicted time and available memory; a name of `estimate.devices`.
        margin: the equivalence margin in nats per token: a smaller difference of losses does not matter; null for none.
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
    margin: Positive | None = None


def read_study(path: Path) -> StudySettings:
    """Read a study file.

    The key `base_study` names a study file or a list of them, relative to this one. This file inherits their settings,
    so that a study of another size need not repeat the axes. Paths in `base` are relative to the file that has them.

    Raises:
        ConfigError: one line that names the key, its value and what would be valid.
    """
    values = plain(read(path, key="base_study", prepare=_with_paths), str(path))
    settings = parse_as(StudySettings, _with_labels(values))
    if len(set(settings.seeds)) < len(settings.seeds):
        raise ConfigError(f"seeds is {shortened(str(settings.seeds), 100)}: seeds must differ")
    if (budget := settings.budget) and budget.range[0] > budget.range[1]:
        raise ConfigError(f"budget.range is {list(budget.range)}: the first number must not be larger than the second")
    return settings


def _with_labels(values: dict[str, Any]) -> dict[str, Any]:
    """Convert names of axes and labels to text, even if YAML reads numbers; other mistakes are reported later."""
    found = dict(values)
    for key in ("axes", "baseline"):
        found |= {key: _text_keys(key, values[key])} if key in values else {}
    if isinstance(axes := found.get("axes"), Mapping):
        found["axes"] = {axis: _text_keys(f"axes.{axis}", points) for axis, points in axes.items()}
    if isinstance(skips := values.get("skip"), list):
        found["skip"] = [
            skip | {"where": _text_keys(f"skip.{number}.where", skip["where"])} if _has_key(skip, "where") else skip
            for number, skip in enumerate(skips)
        ]
    return found


def _has_key(value: Any, key: str) -> bool:
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
    """Resolve the paths in `base` relative to the file."""
    if "base" in values:
        check_references(OmegaConf.to_container(values), str(path))
        given = values["base"]
        names = [given] if isinstance(given, str) else list(given) if OmegaConf.is_list(given) else None
        if not names or not all(isinstance(name, str) and name for name in names):
            shown = shortened(repr(given), 100)
            raise ConfigError(f"{path}: base is {shown}: it must name a run config or a list of them")
        if len(set(names)) < len(names) or len(names) > _MAX_BASES:
            raise ConfigError(f"{path}: base is {shortened(str(given), 100)}: at most {_MAX_BASES} files, none twice")
        values["base"] = [str(find(Path(expand_user(name)), path.parent)) for name in names]
    return values
