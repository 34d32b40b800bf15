"""Reads what a run has logged, and tells its lines from what a power cut or somebody else left among them.

Without torch.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from coe_megatron.files import kind_of, require_file, set_aside, write_atomically
from coe_megatron.parsing import first_of, parse_json

_LONGEST_LINE = 1 << 28  # bytes; the last line of a run with many experts holds N x N numbers for each router
_Number = FiniteFloat | None


class _Line(BaseModel):
    """A logged step: what is read back of it has these types; other keys are free."""

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
    """The objects of a metrics.jsonl; none if the file is missing, and a last line that was cut off is left out.

    Raises:
        ValueError: it cannot be read, or a line is none of a run; one line with its number.
    """
    lines = []
    for number, line in enumerate(_lines(path), 1):
        if line.endswith(b"\n"):
            try:
                lines.append(parse_line(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    return lines


def salvage(path: Path, up_to: int | None = None) -> tuple[list[bytes], str]:
    """The whole lines of a metrics.jsonl as they are, by rising step.

    Args:
        up_to: lines of later steps are left out, and are no damage; nor is a last line that was cut off.

    Returns:
        The lines with their ends, and what is wrong with the others: a line of text, empty if nothing is.
    """
    good: dict[int, bytes] = {}
    wrong, newest = "", -1
    for number, line in enumerate(_lines(path), 1):
        if not line.endswith(b"\n"):
            cut_off = line.startswith(b"{") and b"\0" not in line and len(line) < _LONGEST_LINE
            wrong = wrong or ("" if cut_off else f"line {number} is too long, or no line of a run")
            continue
        try:
            step = parse_line(line)["step"]
        except ValueError as error:
            wrong = wrong or f"line {number}: {error}"
            continue
        if step <= newest:
            wrong = wrong or f"line {number}: its step {step} follows step {newest}"
        good[step], newest = line, max(newest, step)
    return [good[step] for step in sorted(good) if up_to is None or step <= up_to], wrong


def mend_metrics(path: Path, up_to: int | None = None) -> list[bytes]:
    """`salvage`, and leave a file of these lines alone; a damaged one is set aside as a whole, which is said.

    A file that has nothing but these lines is not touched.

    Raises:
        OSError: it cannot be written; it is as it was then, or set aside.
    """
    lines, wrong = salvage(path, up_to)
    if wrong:
        set_aside(path, f"is damaged ({wrong})")
    if wrong or (path.exists() and path.stat().st_size != sum(map(len, lines))):
        write_atomically(path, b"".join(lines))
    return lines


def parse_line(line: bytes) -> dict[str, Any]:
    """One logged step.

    Raises:
        ValueError: it is none; the reason in one line.
    """
    values = parse_json(line, deepest=None)
    try:
        _Line.model_validate(values)
    except ValidationError as error:
        raise ValueError(first_of(error)) from None
    return values


def _lines(path: Path) -> Iterator[bytes]:
    """With their ends, no more of any than `_LONGEST_LINE` bytes; none of a file that is missing."""
    if kind_of(path, path.name) is None:
        return
    with require_file(path, path.name).open("rb") as file:
        while line := file.readline(_LONGEST_LINE):
            yield line
            while not line.endswith(b"\n") and (line := file.readline(_LONGEST_LINE)):
                pass
