"""Reads run.json and checks its fields. Without torch."""

from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coe_megatron.files import kind_of, read_limited
from coe_megatron.parsing import JSON_BYTES, first_of, parse_json

NAME = "run.json"
# Bounds, so that no absurd number is printed with all its digits, or drawn.
_Count: TypeAlias = Annotated[int, Field(ge=0, lt=10**18)]
_Nats: TypeAlias = Annotated[float, Field(ge=0, lt=1e9)]
_Name: TypeAlias = Annotated[str, Field(max_length=1000)]


class _Strict(BaseModel):
    """Converts no types; other keys are not checked."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Attempt(_Strict):
    outcome: str
    began: str | None = None
    ended: str | None = None
    host: str | None = None
    log: str | None = None


class _Parameters(_Strict):
    total: _Count
    active: _Count


class _Record(_Strict):
    attempts: list[_Attempt] = []
    model: _Name = ""
    parameters: _Parameters | None = None
    unigram_entropy: _Nats | None = None
    ranks: _Count = 0
    rollbacks: list[dict[str, Any]] = []


def read_record(folder: Path) -> dict[str, Any]:
    """Read the run.json of a run's folder; empty if there is none.

    Raises:
        ValueError: it cannot be read, or has invalid fields; a one-line reason, to follow its path.
    """
    path = folder / NAME
    if kind_of(path, NAME) is None:
        return {}
    record = parse_json(read_limited(path, NAME, JSON_BYTES))
    try:
        _Record.model_validate(record)
    except ValidationError as error:
        raise ValueError(first_of(error)) from None
    return record
