"""The names of checkpoints, without torch: `step-00000200`, and `step-00000200.tmp` while it is being saved."""

import re
from pathlib import Path

_NAME = re.compile(r"step-([0-9]+)(\.tmp)?")
_BESIDE = re.compile(r"\.step-[0-9]+\.(partial|replaced)")


def name_of(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step in the name of a checkpoint, finished or not; None of any other name."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1])


def is_ours(name: str) -> bool:
    """Whether a checkpoint may have the name, or what is written and renamed on the way to one."""
    return step_of(name) is not None or _BESIDE.fullmatch(name) is not None


def partial_name(name: str) -> str:
    """What a checkpoint of any name is called while a tool makes it."""
    return f".{name}.partial"


def replaced_name(name: str) -> str:
    """What one of any name is called when another takes its place, until it is deleted."""
    return f".{name}.replaced"


def is_finished(name: str) -> bool:
    """Whether it is the name of a checkpoint whose saving was finished."""
    match = _NAME.fullmatch(name)
    return match is not None and match[2] is None


def finished_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in a folder of checkpoints, rising; none if there is no such folder.

    Raises:
        OSError: it cannot be listed.
    """
    try:
        names = [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(step for name in names if is_finished(name) and (step := step_of(name)) is not None)
