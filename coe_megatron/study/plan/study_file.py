"""The study file: what is compared, with which seeds, and what is held equal."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
Exponent = Annotated[float, Field(ge=0, le=4)]
Quantity = Literal["expert_compute", "flops", "parameters", "memory", "wall_clock"]


@dataclass(frozen=True)
class Skip:
    """Combinations that are skipped.

    Attributes:
        where: a label, or a list of labels, for each named axis; other axes match any label.
        reason: the reason, which the plan shows.
        use: labels in which the arm that stands in as a baseline differs from a skipped one, such as
            `{norm_placement: prenorm}`; null if none does.
    """

    where: dict[str, Any]
    reason: str
    use: dict[str, Any] | None = None


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
class SeedLists:
    """Seeds of weights and of data that vary separately: lists of one length, or one of them with a single seed.

    Attributes:
        weights: values of `training.seed`: weights and dropout.
        data: values of `training.data_seed`: the order of samples, and the windows of packed validation sets.
    """

    weights: Annotated[list[Index], Field(min_length=1)]
    data: Annotated[list[Index], Field(min_length=1)]


@dataclass(frozen=True)
class RunSeed:
    """The seeds of a run.

    Attributes:
        name: the seed that names the run's folder, and by which runs are paired.
        weights: `training.seed`.
        data: `training.data_seed`; None for the same as `weights`.
    """

    name: int
    weights: int
    data: int | None = None


@dataclass(frozen=True)
class Tune:
    """A setting that is chosen for each arm before the comparison: by the mean final validation loss over `seeds`.

    Attributes:
        setting: the setting, such as `optimizer.lr`; it must not change the quantity of a budget.
        values: the grid, in increasing order if it holds numbers.
        seeds: seeds of the tuning runs; the comparison uses none of them.
        set: settings of the tuning runs alone, such as fewer `training.steps`.
    """

    setting: str
    values: Annotated[list[Any], Field(min_length=2)]
    seeds: Annotated[list[Index], Field(min_length=1)]
    set: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LadderSettings:
    """Sizes and lengths of runs by a rule (`study.plan.ladder`), as axes besides those of the study.

    Attributes:
        widths: values of `model.hidden_size`, increasing; `study.py register` predicts the largest from the others.
        tokens_per_parameter: lengths of the runs, increasing; several are branches of one run with decay `wsd`.
        rate_exponent: the learning rate falls with the width to this power.
        batch_exponent: the batch grows with the tokens to this power.
        depth_exponent: layers grow with the width to this power; 0 keeps the base's.
        expert_exponent: routed experts grow with the width to this power; 0 keeps the base's.
        rate_factors: factors on the rule's learning rate; several test `rate_exponent`.
    """

    widths: Annotated[list[Count], Field(min_length=2)]
    tokens_per_parameter: Annotated[list[Positive], Field(min_length=1)]
    rate_exponent: Exponent
    batch_exponent: Exponent = 0.0
    depth_exponent: Exponent = 0.0
    expert_exponent: Exponent = 0.0
    rate_factors: Annotated[list[Positive], Field(min_length=1)] = field(default_factory=lambda: [1.0])


@dataclass(frozen=True)
class StudySettings:
    """A complete study file.

    Attributes:
        base: run configs; later ones override earlier ones.
        output: folder of the study.
        axes: axes by name; an axis maps either labels to settings (`MoE(8/64): {chain.iterations: 1, moe.topk: 8}`),
            or settings to lists of values, which are zipped (`moe.topk: [4, 8]`).
        baseline: labels of the arm that others are compared with. Axes that it does not name, or whose label is null,
            divide the study into strata: each arm is compared with the baseline that has its own labels on them.
        seeds: every arm runs once with each, as the value of `training.seed`, or separately for weights and data
            (`{weights: [1, 2, 3], data: [1]}`, of which `read_study` makes `seeds_of`).
        set: settings for all arms, which override `base`.
        skip: combinations of labels to skip.
        budget: what is held equal; null for nothing.
        machine: the machine for predicted time and available memory: a machine file, or a packaged one by its name.
        tune: the setting that each arm has tuned for it; null for none.
        margin: the equivalence margin in nats per token: a smaller difference of losses does not matter; null for none.
        ladder: sizes and lengths of runs by a rule; null for none.
        seeds_of: the lists of `seeds`, if weights and data have their own; `read_study` sets it.
    """

    base: list[str]
    output: PathText
    axes: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    baseline: dict[str, Any]
    seeds: Annotated[list[Index], Field(min_length=1)]
    set: dict[str, Any] = field(default_factory=dict)
    skip: list[Skip] = field(default_factory=list)
    budget: Budget | None = None
    machine: str | None = None
    tune: Tune | None = None
    margin: Positive | None = None
    ladder: LadderSettings | None = None
    seeds_of: SeedLists | None = None

    @property
    def run_seeds(self) -> list[RunSeed]:
        """The seeds of an arm's runs."""
        if (own := self.seeds_of) is None:
            return [RunSeed(seed, seed) for seed in self.seeds]
        pairs = zip(_repeated(own.weights, own.data), _repeated(own.data, own.weights), strict=True)
        return [RunSeed(name, weights, data) for name, (weights, data) in zip(self.seeds, pairs, strict=True)]

    @property
    def seed_effect(self) -> str:
        """What the runs of an arm differ in, in words."""
        weights, data = (set(self.seeds_of.weights), set(self.seeds_of.data)) if self.seeds_of else (set(), set())
        if len(weights) == 1 < len(data):
            return "A seed changes the order of data; all runs begin with the same weights."
        if len(data) == 1 < len(weights):
            return "A seed changes initial weights and dropout; all runs see the data in the same order."
        return "A seed changes initial weights, dropout and the order of data."


def read_study(path: Path) -> StudySettings:
    """Read a study file.

    The key `base_study` names a study file or a list of them, relative to this one. This file inherits their settings,
    so that a study of another size need not repeat the axes. Paths in `base` are relative to the file that has them.

    Raises:
        ConfigError: one line that names the key, its value and what would be valid.
    """
    values = plain(read(path, key="base_study", prepare=_prepared), str(path))
    settings = parse_as(StudySettings, _with_labels(values))
    _require_different("seeds", settings.seeds)
    if settings.tune:
        _check_tune(settings.tune, settings)
    if settings.ladder:
        for name in ("widths", "tokens_per_parameter", "rate_factors"):
            _require_increasing(f"ladder.{name}", getattr(settings.ladder, name))
    if (budget := settings.budget) and budget.range[0] > budget.range[1]:
        raise ConfigError(f"budget.range is {list(budget.range)}: the first number must not be larger than the second")
    return settings


def _check_tune(tune: Tune, settings: StudySettings) -> None:
    """Check that values and seeds differ, and that the seeds are not those of the comparison."""
    _require_different("tune.seeds", tune.seeds)
    _require_different("tune.values", tune.values)
    if all(isinstance(value, int | float) for value in tune.values):
        _require_increasing("tune.values", tune.values)
    used = {number for seed in settings.run_seeds for number in (seed.weights, seed.data)}
    if both := [seed for seed in tune.seeds if seed in used]:
        raise ConfigError(
            f"tune.seeds has {both[0]}, which is one of seeds: a value is chosen with seeds that the comparison does "
            "not use"
        )


def _require_different(name: str, values: Sequence[Any]) -> None:
    if len(set(map(text_of, values))) < len(values):
        raise ConfigError(f"{name} is {shortened(str(values), 100)}: {name.split('.')[-1]} must differ")


def _require_increasing(name: str, values: Sequence[Any]) -> None:
    _require_different(name, values)
    if sorted(values) != values:
        raise ConfigError(f"{name} is {shortened(str(values), 100)}: numbers must be in increasing order")


def _repeated(seeds: list[int], other: list[int]) -> list[int]:
    return seeds * len(other) if len(seeds) == 1 else seeds


def _with_labels(values: dict[str, Any]) -> dict[str, Any]:
    """Convert names of axes and labels to text, even if YAML reads numbers; other mistakes are reported later."""
    found = dict(values)
    for key in ("axes", "baseline"):
        found |= {key: _text_keys(key, values[key])} if key in values else {}
    if isinstance(axes := found.get("axes"), Mapping):
        found["axes"] = {axis: _text_keys(f"axes.{axis}", points) for axis, points in axes.items()}
    if isinstance(skips := values.get("skip"), list):
        found["skip"] = [_skip_with_labels(f"skip.{number}", skip) for number, skip in enumerate(skips)]
    return found


def _skip_with_labels(where: str, skip: Any) -> Any:
    if not isinstance(skip, Mapping):
        return skip
    return {key: _text_keys(f"{where}.{key}", each) if key in ("where", "use") else each for key, each in skip.items()}


def _text_keys(where: str, given: Any) -> Any:
    if not isinstance(given, Mapping):
        return given
    found = {text_of(key): value for key, value in given.items()}
    if len(found) < len(given):
        twice = next(key for key in given if not isinstance(key, str))
        raise ConfigError(f"{shortened(where, 100)} has {text_of(twice)} twice, as text and as something else")
    return found


def _prepared(path: Path, values: Any) -> Any:
    """A file's own keys as they can be merged over those of its bases."""
    return _with_paths(path, _with_seed_lists(path, values))


def _with_seed_lists(path: Path, values: Any) -> Any:
    """Divide `seeds: {weights: ..., data: ...}` into a list of names, `seeds`, and the lists, `seeds_of`."""
    if "seeds_of" in values:
        raise ConfigError(f"{path}: seeds_of is not a setting; did you mean seeds: {{weights: [1, 2, 3], data: [1]}}?")
    if "seeds" not in values:
        return values
    given, values["seeds_of"] = values["seeds"], None
    if OmegaConf.is_dict(given):
        try:
            lists = parse_as(SeedLists, plain(given, "it"))
        except ConfigError as error:
            raise ConfigError(f"{path}: seeds.{error}") from None
        sizes = {len(lists.weights), len(lists.data)}
        if len(sizes) > 1 and 1 not in sizes:
            raise ConfigError(
                f"{path}: seeds has {len(lists.weights)} weights and {len(lists.data)} data: use lists of one length, "
                "or one with a single seed"
            )
        names = lists.data if len(lists.data) > len(lists.weights) else lists.weights
        values["seeds"], values["seeds_of"] = names, asdict(lists)
    return values


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
