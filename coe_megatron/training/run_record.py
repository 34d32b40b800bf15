"""What run.json holds of a run, read back: its shape is checked before anybody relies on it. Without torch."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, NonNegativeInt, ValidationError

from coe_megatron.files import kind_of, read_limited
from coe_megatron.parsing import JSON_BYTES, first_of, parse_json

NAME = "run.json"


class _Strict(BaseModel):
    """Nothing is converted, and keys beyond these are free."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Attempt(_Strict):
    outcome: str
    began: str | None = None
    ended: str | None = None
    host: str | None = None
    log: str | None = None


class _Parameters(_Strict):
    total: NonNegativeInt
    active: NonNegativeInt


class _Record(_Strict):
    attempts: list[_Attempt] = []
    model: str = ""
    parameters: _Parameters | None = None
    unigram_entropy: FiniteFloat | None = None
    ranks: NonNegativeInt = 0
    rolled_back: list[dict[str, Any]] = []


def read_record(folder: Path) -> dict[str, Any]:
    """The run.json in a run's folder; empty if there is none.

    Raises:
        ValueError: it cannot be read, or is of another shape; one line that says why, to follow its path.
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
