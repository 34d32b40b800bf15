"""`state.json` of a checkpoint: the layout that saved it and the state of the training loop."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from coe_megatron.errors import ConfigError
from coe_megatron.files import read_limited
from coe_megatron.parsing import parse_json
from coe_megatron.text import shortened

METADATA = "state.json"
_MOST_BYTES = 1 << 20
Count: TypeAlias = Annotated[int, Field(strict=True, ge=0, le=2**53)]
_Size: TypeAlias = Annotated[int, Field(strict=True, ge=1, le=2**31)]
_Text: TypeAlias = Annotated[str, Field(strict=True)]
_Loss: TypeAlias = Annotated[float, Field(strict=True, allow_inf_nan=False)]


@dataclass(frozen=True)
class _State:
    """Field types of the training loop's state: `checkpoint.manager.TrainState`, and the tokenizer."""

    step: Count = 0
    tokens: Count = 0
    skipped_steps: Count = 0
    consecutive_skips: list[_Loss | None] = field(default_factory=list)
    losses: list[_Loss] = field(default_factory=list)
    data_offset: Count = 0
    rollbacks: list[dict[_Text, Any]] = field(default_factory=list)
    tokenizer: _Text = ""


@dataclass(frozen=True)
class SavedLayout:
    """The layout of the ranks that saved; any other layout can load the checkpoint."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    world_size: _Size
    tensor: _Size
    pipeline: _Size
    expert: _Size
    expert_tensor: _Size
    zero_stage: Annotated[int, Field(strict=True, ge=0, le=3)]
    context: _Size = 1
    virtual_pipeline: _Size = 1

    def same_ranks(self, other: "SavedLayout") -> bool:
        """Whether each rank has the same role; the ZeRO stage may differ, as it does not change random numbers."""
        return replace(self, zero_stage=other.zero_stage) == other


@dataclass(frozen=True)
class CheckpointMetadata:
    """The contents of `state.json`.

    Attributes:
        optimizer_steps: AdamW's step count; None if the checkpoint has no moments.
        state: of the training loop.
        derived_from: names of the checkpoints from which a tool made this one.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    layout: SavedLayout
    optimizer_steps: Count | None
    state: dict[_Text, Any]
    derived_from: list[_Text] | None = None

    @classmethod
    def read(cls, checkpoint: Path) -> "CheckpointMetadata":
        """Read `state.json` of a checkpoint.

        Raises:
            ConfigError: it cannot be read, or has missing, unknown or invalid fields.
        """
        content = read_limited(checkpoint / METADATA, METADATA, _MOST_BYTES)
        try:
            found = _METADATA.validate_python(parse_json(content))
            _STATE.validate_python(found.state)
            return found
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            place = shortened(".".join(map(str, first["loc"])), 100)
            wanted = first["msg"].lower().partition(" or an instance")[0]
            raise ConfigError(f"{METADATA} is invalid: {place or 'top level'}: {wanted}") from None
        except ValueError as error:
            raise ConfigError(f"{METADATA} cannot be read: {error}") from None

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {name: value for name, value in asdict(self).items() if name != "derived_from" or value is not None}

    def as_json(self) -> str:
        """The file's content.

        Raises:
            ValueError: a number is not finite, so that `read` would refuse it.
        """
        return json.dumps(self.as_dict(), indent=1, allow_nan=False)


_METADATA, _STATE = TypeAdapter(CheckpointMetadata), TypeAdapter(_State)
