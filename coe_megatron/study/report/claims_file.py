"""The claims file: statements about arms of studies, in a form that their reports can decide."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from coe_megatron.config.load import parse_as, plain, read
from coe_megatron.config.packaged import find
from coe_megatron.config.settings import NonNegative, PathText
from coe_megatron.errors import ConfigError
from coe_megatron.files import expand_user
from coe_megatron.study.plan.names import text_of
from coe_megatron.text import shortened

Relation = Literal["less", "greater", "equal", "not_less", "not_greater"]
Measure = Literal[
    "loss", "loss_at_equal_memory", "accuracy", "rise", "loss_sd", "memory", "memory_predicted", "flops", "parameters"
]
RELATIVE: tuple[str, ...] = ("loss_sd", "memory", "memory_predicted", "flops", "parameters")
OF_ONE_NUMBER: tuple[str, ...] = ("memory", "memory_predicted", "flops", "parameters")  # the same for every seed
_MAX_CLAIMS = 200


@dataclass(frozen=True)
class Condition:
    """One comparison of an arm with another arm of the same study.

    Attributes:
        report: folder of the study's report, with results.csv and timings.csv.
        where: labels of both arms, by axis.
        arm: the arm: one of its labels that no other arm with the labels of `where` has, or labels by axis.
        other: the arm that it is compared with; for `loss_at_equal_memory` a list of arms, the sizes of one design.
        measure: `loss`, the final validation loss in nats per token; `loss_at_equal_memory`, the same, where `other` is
            interpolated to the arm's memory; `accuracy` of answers; `rise`, the largest rise of the validation loss
            above an earlier evaluation, a measure of instability; `loss_sd`, the s.d. of the loss over seeds;
            `memory`, the measured peak of a rank; `memory_predicted`; `flops` of a run; `parameters`.
        set: the validation set of a loss; null for all together.
        relation: of the arm to the other: `less` or `greater` by at least `by`; `equal` within `margin`; `not_less` or
            `not_greater` by `margin` or more.
        by: smallest difference of `less` and `greater`, in the unit of the measure; a fraction of the other's value for
            `loss_sd`, memory, FLOPs and parameters.
        margin: in the same unit. `less` and `greater` do not hold if the difference is shown to be smaller than it.
        than_in: labels that replace those of both arms, by axis: then the difference of the arms is compared with
            their difference there (an interaction). Null for a comparison with no difference.
    """

    report: PathText
    arm: str | dict[str, Any]
    other: str | dict[str, Any] | list[str | dict[str, Any]]
    measure: Measure
    relation: Relation
    where: dict[str, Any] = field(default_factory=dict)
    set: str | None = None
    by: NonNegative = 0.0
    margin: NonNegative | None = None
    than_in: dict[str, Any] | None = None


@dataclass(frozen=True)
class Claim:
    """A statement, which holds if all conditions hold.

    Attributes:
        id: its name.
        statement: what is claimed, in words.
        all: the conditions.
    """

    id: str
    statement: str
    all: Annotated[list[Condition], Field(min_length=1)]


@dataclass(frozen=True)
class Claims:
    """A claims file.

    Attributes:
        claims: the claims, in order.
        title: of the page with the verdicts.
    """

    claims: Annotated[list[Claim], Field(min_length=1, max_length=_MAX_CLAIMS)]
    title: str = "Claims"


_OF_CLAIM = {"id", "statement", "all"}
_OF_CONDITION = {each.name for each in fields(Condition)}


def read_claims(path: Path) -> Claims:
    """Read a claims file.

    Keys of a condition may also be given for a claim (which then needs no `all`), or at the top for all claims; the
    labels of `where` are merged. `report` is relative to the file.

    Raises:
        ConfigError: one line that names the key, its value and what would be valid.
    """
    path = find(path)
    found = parse_as(Claims, _with_defaults(plain(read(path), str(path)), path.parent))
    ids = [claim.id for claim in found.claims]
    if twice := next((each for each in ids if ids.count(each) > 1), None):
        raise ConfigError(f"claims has the id {shortened(twice, 100)!r} twice: ids must differ")
    for number, claim in enumerate(found.claims):
        for place, condition in enumerate(claim.all):
            _check(f"claims.{number}.all.{place}", condition)
    return found


def _with_defaults(values: Any, folder: Path) -> Any:
    """Every claim with its list of conditions, and every condition with all of its keys."""
    if not isinstance(values, Mapping) or not isinstance(values.get("claims"), list):
        return values
    common = {key: value for key, value in values.items() if key in _OF_CONDITION}
    others = {key: value for key, value in values.items() if key not in _OF_CONDITION}
    return others | {"claims": [_claim(common, claim, folder) for claim in values["claims"]]}


def _claim(common: Mapping[str, Any], claim: Any, folder: Path) -> Any:
    if not isinstance(claim, Mapping):
        return claim
    own = {key: value for key, value in claim.items() if key in _OF_CONDITION}
    conditions = claim.get("all", [{}])
    if isinstance(conditions, list):
        conditions = [_condition([common, own, each], folder) for each in conditions]
    return {key: value for key, value in claim.items() if key not in _OF_CONDITION} | {"all": conditions}


def _condition(parts: list[Any], folder: Path) -> Any:
    """The parts merged, later ones over earlier ones, with labels as text and `report` relative to a folder."""
    if not isinstance(parts[-1], Mapping):
        return parts[-1]
    found = {key: value for part in parts for key, value in part.items()}
    places = [part["where"] for part in parts if "where" in part]
    if all(isinstance(place, Mapping) for place in places):
        found["where"] = {axis: label for place in places for axis, label in place.items()}
    if isinstance(report := found.get("report"), str) and report:
        found["report"] = str(folder / expand_user(report))
    return {
        key: _as_text(value) if key in ("where", "than_in", "arm", "other") else value for key, value in found.items()
    }


def _as_text(value: Any) -> Any:
    """Labels as text, even if YAML reads numbers."""
    if isinstance(value, Mapping):
        return {text_of(axis): text_of(label) for axis, label in value.items()}
    if isinstance(value, list):
        return [_as_text(each) for each in value]
    return value if value is None else text_of(value)


def _check(where: str, condition: Condition) -> None:
    """Check what does not depend on the reports."""
    measure, relation, margin = condition.measure, condition.relation, condition.margin
    if relation == "equal" and not margin:
        raise ConfigError(f"{where}.margin is {margin}: relation equal needs a margin above 0")
    if measure == "loss_sd" and relation == "equal":
        raise ConfigError(f"{where}.relation is equal: for loss_sd it must be another one")
    for key, value in (("by", condition.by), ("margin", margin)):
        if measure in RELATIVE and value is not None and value >= 1:
            raise ConfigError(f"{where}.{key} is {value:g}: for {measure} it is a fraction, and must be below 1")
    if isinstance(condition.other, list) != (measure == "loss_at_equal_memory"):
        raise ConfigError(f"{where}.other must be a list of arms for loss_at_equal_memory, and one arm otherwise")
    if condition.set is not None and measure != "loss":
        raise ConfigError(f"{where}.set is {shortened(condition.set, 100)!r}: only the measure loss has one")
    if condition.than_in is not None and measure not in ("loss", "accuracy", "rise"):
        raise ConfigError(f"{where}.than_in: it needs a measure of every seed: loss, accuracy or rise")
