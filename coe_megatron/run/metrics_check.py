"""Check that a run's metrics have the values that a report uses, beyond those that every line has."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coe_megatron.parsing import first_of

_Number = Annotated[float, Field(gt=-1e18, lt=1e18)]  # finite, and small enough for arithmetic and figures
_Amount = Annotated[float, Field(ge=0, lt=1e18)]
_Seconds = Annotated[float, Field(ge=0, lt=1e12)]  # a larger sum would lose the seconds of a step


class _Timed(BaseModel):
    """Times of a line; null is a number that was not finite."""

    model_config = ConfigDict(strict=True)

    step_seconds: _Seconds | None = None
    eta_seconds: _Seconds | None = None


class _Memory(BaseModel):
    model_config = ConfigDict(strict=True)

    peak: _Amount


class _SetLoss(BaseModel):
    """The loss of one validation set."""

    model_config = ConfigDict(strict=True)

    loss: _Number | None = None


class _Answers(BaseModel):
    """Final answers of one group of problems."""

    model_config = ConfigDict(strict=True)

    accuracy: Annotated[float, Field(ge=0, le=1)]
    problems: Annotated[int, Field(ge=1, lt=1 << 53)]


class _Evaluation(BaseModel):
    """A line; null is a number that was not finite."""

    model_config = ConfigDict(strict=True)

    tokens: _Amount
    valid_loss: _Number | None = None
    valid: dict[str, _SetLoss] = {}
    answer_accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    answer_problems: Annotated[int, Field(ge=1, lt=1 << 53)] | None = None
    answer_groups: dict[str, _Answers] = {}


class _Step(_Evaluation):
    step_seconds: _Seconds
    memory: _Memory
    train_loss: _Number | None = None
    routing_entropy: _Number | None = None
    routing_load_max_over_mean: _Number | None = None
    routing_dead_experts: _Number | None = None
    routing_dropped: _Number | None = None
    routing_overlap: _Number | None = None


class _Place(BaseModel):
    """A layer in an iteration; `load` has one number for each of N experts, `pairs` has N x N."""

    model_config = ConfigDict(strict=True)

    layer: Annotated[int, Field(ge=1)]
    iteration: Annotated[int, Field(ge=1)]
    load: list[_Amount]
    state_norm: _Amount | None
    increment_over_state: _Amount | None
    increment_norm: _Amount | None = None
    overlap: _Amount | None = None
    increment_cosines: list[_Number | None] | None = None
    single_scale: _Amount | None = None
    pairs: list[list[_Amount]] | None = None


class _LastStep(_Step):
    tokens_per_second: _Amount | None
    tflops: _Amount | None
    train_loss: _Number | None
    routing: Annotated[list[_Place], Field(min_length=1)]


def find_damage(lines: Sequence[Mapping[str, Any]], experts: int) -> str:
    """Find damage in the lines of a finished run, as returned by `read_metrics`; returns "" if there is none.

    Args:
        experts: experts of a layer.
    """
    if reason := _out_of_order(lines):
        return reason
    last = max((number for number, line in enumerate(lines) if "step_seconds" in line), default=None)
    if last is None:
        return "no line is of a step"
    for number, line in enumerate(lines):
        kind = _LastStep if number == last else _Step if "step_seconds" in line else _Evaluation
        if reason := _misfit(kind, line):
            return reason
    for place in lines[last]["routing"]:
        rows = [place["load"], *(place.get("pairs") or [])]
        if {len(row) for row in rows} != {experts} or len(rows) not in (1, experts + 1):
            return f"step {lines[last]['step']}: routing is not that of {experts} experts"
    return ""


def find_damaged_times(lines: Sequence[Mapping[str, Any]]) -> str:
    """Find damage in the step times of a run, finished or not; returns "" if there is none."""
    return _out_of_order(lines) or next(filter(None, (_misfit(_Timed, line) for line in lines)), "")


def _out_of_order(lines: Sequence[Mapping[str, Any]]) -> str:
    for before, after in pairwise(lines):
        if after["step"] <= before["step"]:
            return f"step {after['step']} follows step {before['step']}"
    return ""


def _misfit(kind: type[BaseModel], line: Mapping[str, Any]) -> str:
    try:
        kind.model_validate(line)
    except ValidationError as error:
        return f"step {line['step']}: {first_of(error)}"
    return ""
