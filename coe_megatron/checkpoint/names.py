"""The names of checkpoints, without torch: `step-00000200`, and `step-00000200.tmp` while it is being saved."""

import re
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"step-([0-9]+)(\.tmp)?")
_BESIDE = re.compile(r"\.step-[0-9]+\.(partial|replaced)")


@dataclass(frozen=True)
class CheckpointName:
    """What the name of a checkpoint's folder says: its step, and whether saving it was finished."""

    step: int
    finished: bool = True

    @classmethod
    def parse(cls, name: str) -> "CheckpointName | None":
        """None of a name that no run gives."""
        match = _NAME.fullmatch(name)
        return match and cls(int(match[1]), match[2] is None)

    def __str__(self) -> str:
        return f"step-{self.step:08d}" + ("" if self.finished else ".tmp")


def name_of(step: int) -> str:
    """The name of a finished checkpoint."""
    return str(CheckpointName(step))


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint that has a name of ours."""
    found = CheckpointName.parse(checkpoint.name)
    assert found is not None, checkpoint
    return found.step


def is_ours(name: str) -> bool:
    """Whether a checkpoint may have the name, or what is written and renamed on the way to one."""
    return CheckpointName.parse(name) is not None or _BESIDE.fullmatch(name) is not None


def is_finished(name: str) -> bool:
    """Whether it is the name of a checkpoint whose saving was finished."""
    found = CheckpointName.parse(name)
    return found is not None and found.finished


def partial_name(name: str) -> str:
    """What a checkpoint of any name is called while a tool makes it."""
    return f".{name}.partial"


def replaced_name(name: str) -> str:
    """What one of any name is called when another takes its place, until it is deleted."""
    return f".{name}.replaced"


def finished_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in a folder of checkpoints, rising; none if there is no such folder.

    Raises:
        OSError: it cannot be listed.
    """
    try:
        found = [CheckpointName.parse(path.name) for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name.step for name in found if name is not None and name.finished)
