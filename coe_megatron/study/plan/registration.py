"""Register what a ladder's largest width will show before it runs, and check afterwards that nothing was changed.

OUTPUT/registration.json has the predictions, the law behind them, the settings of every arm, digests of the data, and
the losses that the law was fitted to. Its last key is the SHA-256 of all others.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coe_megatron.config import RunConfig, flat
from coe_megatron.data.folders import data_folders
from coe_megatron.data.manifest import Manifest
from coe_megatron.errors import ConfigError
from coe_megatron.files import kind_of, read_limited, require_replaceable, write_atomically
from coe_megatron.parsing import JSON_BYTES, first_of, parse_json
from coe_megatron.study.plan.amounts import Amounts
from coe_megatron.study.plan.arms import Arm, Study, largest_arms
from coe_megatron.study.plan.ladder import sizes
from coe_megatron.study.plan.law import LawFit, Point, fit_law
from coe_megatron.study.plan.past_runs import final_loss

_FILE = "registration.json"
_OWN = ("output", "training.seed", "training.data_seed", "training.branch_from")  # differ by run, or hold its folder
_Loss = Annotated[float, Field(gt=0, lt=1e6)]


class Prediction(BaseModel):
    """The predicted final validation loss of an arm in nats per token, and its 95 % interval."""

    model_config = ConfigDict(extra="forbid")

    loss: _Loss
    interval: tuple[_Loss, _Loss]


class Registration(BaseModel):
    """The contents of registration.json.

    Attributes:
        predictions: by arm of the largest width.
        law: parameters of the law, with their 95 % intervals.
        warnings: what the fitted runs cannot tell.
        settings: settings of every arm, without those that differ by run.
        seeds: seeds of weights and data of every arm's runs.
        data: digest of every data set, by the setting that names it.
        inputs: final loss of every run that the law was fitted to, by its folder within the study's.
        sha256: of all the rest.
    """

    model_config = ConfigDict(extra="forbid")

    predictions: dict[str, Prediction]
    law: dict[str, tuple[float, float, float]]
    warnings: list[str]
    settings: dict[str, dict[str, Any]]
    seeds: list[list[int | None]]
    data: dict[str, str]
    inputs: dict[str, float]
    sha256: str = ""

    @property
    def digest(self) -> str:
        """The SHA-256 that it must have."""
        return _digest(self.model_dump(mode="json", exclude={"sha256"}))


@dataclass(frozen=True)
class LadderRuns:
    """The runs of a ladder as points of the law: those to fit, by folder, and those to predict, by arm."""

    fitted: dict[str, Point]
    predicted: dict[str, Point]
    missing: list[str]

    def fit(self) -> LawFit:
        """The law of the smaller widths; raises as `fit_law`."""
        return fit_law(list(self.fitted.values()))


def ladder_runs(study: Study) -> LadderRuns:
    """The points of a study with a ladder; `missing` are the folders of smaller runs that have no loss yet."""
    fitted, predicted, missing, amounts, largest = {}, {}, [], Amounts(), largest_arms(study)
    for arm in study.arms:
        point = point_of(arm, amounts)
        if arm.name in largest:
            predicted[arm.name] = point
            continue
        for run in arm.runs(study.settings.run_seeds):
            name, loss = _within(study, run.config), final_loss(run)
            if loss is None:
                missing.append(name)
            else:
                fitted[name] = Point(point.outside, point.inside, point.iterations, point.tokens, loss)
    return LadderRuns(fitted, predicted, missing)


def register(study: Study) -> tuple[Path, Registration]:
    """Fit the law to all widths but the largest, predict the largest, and write the file.

    Raises:
        ConfigError: the study has no ladder, runs to fit are missing, a run to predict has begun, or it is registered
            already; one line.
    """
    path = _path(study)
    ladder = study.settings.ladder
    if ladder is None:
        raise ConfigError("ladder is null: only the largest width of a ladder can be registered")
    if len(ladder.rate_factors) > 1:
        raise ConfigError(
            f"ladder.rate_factors is {ladder.rate_factors}: a prediction needs one learning rate per width"
        )
    if kind_of(path, _FILE) is not None:
        raise ConfigError(f"{path} exists: this study is registered already")
    for arm in study.arms:
        for run in arm.runs(study.settings.run_seeds) if arm.name in largest_arms(study) else []:
            if kind_of(Path(run.config.output), "the folder of a run") is not None:
                raise ConfigError(f"{run.config.output} exists: the largest width must be registered before it runs")
    runs = ladder_runs(study)
    if runs.missing:
        raise ConfigError(f"{len(runs.missing)} runs of smaller widths have no loss yet, such as {runs.missing[0]}")
    found = _registration(study, runs)
    require_replaceable(path, _FILE)
    try:
        write_atomically(path, json.dumps(found.model_dump(mode="json"), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
    return path, found


def read_registration(study: Study) -> Registration | None:
    """The registration of a study, after checking that the study is still the one that was registered; None without.

    Raises:
        ConfigError: the file is damaged or was changed; or settings, seeds, data or fitted losses differ from it. One
            line that names the first difference.
    """
    path = _path(study)
    if study.settings.ladder is None or kind_of(path, _FILE) is None:
        return None
    try:
        found = Registration.model_validate(parse_json(read_limited(path, _FILE, JSON_BYTES)))
    except ValidationError as error:
        raise ConfigError(f"{path} is damaged: {first_of(error)}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}") from None
    if found.digest != found.sha256:
        raise ConfigError(f"{path} was changed after it was written: its sha256 does not fit its contents")
    if reason := _difference(study, found):
        raise ConfigError(f"{path}: {reason}; undo the change, or give the changed study another output")
    return found


def _registration(study: Study, runs: LadderRuns) -> Registration:
    fit = runs.fit()
    predictions = {}
    for arm, point in runs.predicted.items():
        loss, interval = fit.predict(point)
        predictions[arm] = Prediction(loss=loss, interval=interval)
    found = Registration(
        predictions=predictions,
        law={name: (value, *fit.intervals[name]) for name, value in asdict(fit.law).items()},
        warnings=fit.warnings,
        settings=_settings(study),
        seeds=_seeds(study),
        data=_data(study),
        inputs={name: point.loss for name, point in runs.fitted.items()},
    )
    return found.model_copy(update={"sha256": found.digest})


def _difference(study: Study, registered: Registration) -> str:
    """The first difference between a study and its registration; empty if there is none."""
    for arm, settings in _settings(study).items():
        if arm not in registered.settings:
            return f"arm {arm} is not registered"
        if reason := _first(settings, registered.settings[arm]):
            return f"{arm}: {reason}"
    if gone := [arm for arm in registered.settings if arm not in {each.name for each in study.arms}]:
        return f"arm {gone[0]} is registered, but not in the study"
    if _seeds(study) != registered.seeds:
        return f"seeds (weights, data) are {_seeds(study)}, but {registered.seeds} are registered"
    if reason := _first(_data(study), registered.data):
        return f"the data have changed: the digest of {reason}"
    losses = {name: point.loss for name, point in ladder_runs(study).fitted.items()}
    return _first(losses, registered.inputs, "loss of ") or _first(registered.inputs, losses, "registered loss of ")


def _first(now: Mapping[str, Any], then: Mapping[str, Any], of: str = "") -> str:
    for key, value in now.items():
        if then.get(key) != value:
            return f"{of}{key} is {value}, but {then.get(key)} is registered"
    return ""


def point_of(arm: Arm, amounts: Amounts) -> Point:
    """An arm as a point of the law, without a loss."""
    run = amounts.run(arm.config)
    return Point(*sizes(run.shape.model), run.shape.config.chain.iterations, run.tokens)


def _settings(study: Study) -> dict[str, dict[str, Any]]:
    """As JSON values, so that they can be compared with those of a file."""
    found = {arm.name: {key: each for key, each in flat(arm.config).items() if key not in _OWN} for arm in study.arms}
    return dict(json.loads(json.dumps(found)))


def _seeds(study: Study) -> list[list[int | None]]:
    return [[seed.weights, seed.data] for seed in study.settings.run_seeds]


def _data(study: Study) -> dict[str, str]:
    """A digest of every data set of the first arm, which all arms share unless an axis changes them."""
    found = {}
    for folder in data_folders(study.arms[0].config.data):
        if folder.is_prefix:
            with Path(f"{folder.path}.idx").open("rb") as index:
                found[folder.setting] = hashlib.file_digest(index, "sha256").hexdigest()
        elif folder.exists:
            manifest = folder.read()
            assert isinstance(manifest, Manifest)  # it is no prefix
            found[folder.setting] = _digest({name: each.sha256 for name, each in manifest.files.items()})
    return found


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _within(study: Study, config: RunConfig) -> str:
    return str(Path(config.output).relative_to(study.settings.output))


def _path(study: Study) -> Path:
    return Path(study.settings.output) / _FILE


def prediction_errors(registered: Registration, losses: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """By arm, the measured mean loss over the predicted one, minus 1; None for an arm without losses."""
    return {
        arm: sum(found) / len(found) / each.loss - 1 if (found := losses.get(arm)) else None
        for arm, each in registered.predictions.items()
    }
