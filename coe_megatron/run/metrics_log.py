"""Reads metrics.jsonl, and separates intact lines from damaged ones (power cut, other programs). Without torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from coe_megatron.files import kind_of, require_file, set_aside, write_atomically
from coe_megatron.parsing import first_of, parse_json

_MAX_LINE = 1 << 28  # bytes; with N experts the last line has N x N numbers for each router
_Number = FiniteFloat | None


class _Line(BaseModel):
    """A logged step: types of the keys that are read back; other keys are not checked."""

    model_config = ConfigDict(strict=True, extra="allow")

    step: int = Field(ge=0, lt=1 << 53)
    tokens: int = Field(default=0, ge=0, lt=1 << 63)
    train_loss: _Number = None
    valid_loss: _Number = None
    valid: dict[str, dict[str, _Number]] = {}
    tokens_per_second: _Number = None
    step_seconds: _Number = None
    eta_seconds: _Number = None
    tflops: _Number = None
    mfu: _Number = None
    memory: dict[str, _Number] = {}
    routing: list[dict[str, Any]] = []


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, without an incomplete last line; empty if the file is missing.

    Raises:
        ValueError: it cannot be read, or a line is invalid; one line with its number.
    """
    lines = []
    for number, line in enumerate(_lines(path), 1):
        if line.endswith(b"\n"):
            try:
                lines.append(parse_line(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    return lines


def intact_lines(path: Path, up_to: int | None = None) -> tuple[list[bytes], str]:
    """The intact lines of a metrics.jsonl, unchanged, in order of steps.

    Args:
        up_to: skip lines of later steps. These do not count as damage, nor does an incomplete last line.

    Returns:
        The lines with their line ends, and what is wrong with the others: one line, empty if nothing is.
    """
    good: dict[int, bytes] = {}
    wrong, latest = "", -1
    for number, line in enumerate(_lines(path), 1):
        if not line.endswith(b"\n"):
            cut_off = line.startswith(b"{") and b"\0" not in line and len(line) < _MAX_LINE
            wrong = wrong or ("" if cut_off else f"line {number} is too long, or not a logged step")
            continue
        try:
            step = parse_line(line)["step"]
        except ValueError as error:
            wrong = wrong or f"line {number}: {error}"
            continue
        if step <= latest:
            wrong = wrong or f"line {number}: its step {step} follows step {latest}"
        good[step], latest = line, max(latest, step)
    return [good[step] for step in sorted(good) if up_to is None or step <= up_to], wrong


def repair_metrics(path: Path, up_to: int | None = None) -> list[bytes]:
    """Rewrite a metrics.jsonl to hold only its `intact_lines`, and return these.

    A damaged file is first renamed out of the way and reported on stderr. A file of intact lines only does not change.

    Raises:
        OSError: it cannot be written; the original is unchanged or renamed.
    """
    lines, wrong = intact_lines(path, up_to)
    if wrong:
        set_aside(path, f"is damaged ({wrong})")
    if wrong or (path.exists() and path.stat().st_size != sum(map(len, lines))):
        write_atomically(path, b"".join(lines))
    return lines


def parse_line(line: bytes) -> dict[str, Any]:
    """Parse one logged step.

    Raises:
        ValueError: it is invalid; the reason in one line.
    """
    values = parse_json(line, deepest=None)
    try:
        _Line.model_validate(values)
    except ValidationError as error:
        raise ValueError(first_of(error)) from None
    return values


def _lines(path: Path) -> Iterator[bytes]:
    """Lines with their ends, at most `_MAX_LINE` bytes of each; none if the file is missing."""
    if kind_of(path, path.name) is None:
        return
    with require_file(path, path.name).open("rb") as file:
        while line := file.readline(_MAX_LINE):
            yield line
            while not line.endswith(b"\n") and (line := file.readline(_MAX_LINE)):
                pass
