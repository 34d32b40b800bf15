"""Names of checkpoints: `step-00000200`, and `step-00000200.tmp` while it is being saved. Without torch."""

import re
from pathlib import Path

_NAME = re.compile(r"step-([0-9]+)(\.tmp)?")
_TEMPORARY = re.compile(r"\.step-[0-9]+\.(partial|replaced)")


def name_of(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step in the name of a finished or unfinished checkpoint; None for any other name."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1])


def is_ours(name: str) -> bool:
    """Whether the name is that of a checkpoint or of a temporary folder of one."""
    return step_of(name) is not None or _TEMPORARY.fullmatch(name) is not None


def partial_name(name: str) -> str:
    """The temporary name of a checkpoint while a tool writes it."""
    return f".{name}.partial"


def replaced_name(name: str) -> str:
    """The temporary name of a checkpoint that was replaced, until it is deleted."""
    return f".{name}.replaced"


def is_finished(name: str) -> bool:
    """Whether the name is that of a checkpoint whose save was finished."""
    match = _NAME.fullmatch(name)
    return match is not None and match[2] is None


def finished_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in a folder, ascending; empty if there is no such folder.

    Raises:
        OSError: it cannot be listed.
    """
    try:
        names = [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(step for name in names if is_finished(name) and (step := step_of(name)) is not None)
