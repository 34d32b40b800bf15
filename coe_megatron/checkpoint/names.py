"""Names of checkpoints: `step-00000200`, and `step-00000200.tmp` while it is being saved. Without torch."""

import re
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"step-([0-9]+)(\.tmp)?")
_TEMPORARY = re.compile(r"\.step-[0-9]+\.(partial|replaced)")


@dataclass(frozen=True)
class CheckpointName:
    """The name of a checkpoint's folder: its step, and whether its save was finished."""

    step: int
    finished: bool = True

    @classmethod
    def parse(cls, name: str) -> "CheckpointName | None":
        """Parse a name; None if it is not that of a checkpoint."""
        match = _NAME.fullmatch(name)
        return match and cls(int(match[1]), match[2] is None)

    def __str__(self) -> str:
        return f"step-{self.step:08d}" + ("" if self.finished else ".tmp")


def name_of(step: int) -> str:
    """The name of a finished checkpoint."""
    return str(CheckpointName(step))


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint, finished or not."""
    found = CheckpointName.parse(checkpoint.name)
    assert found is not None, checkpoint
    return found.step


def is_ours(name: str) -> bool:
    """Whether the name is that of a checkpoint or of a temporary folder of one."""
    return CheckpointName.parse(name) is not None or _TEMPORARY.fullmatch(name) is not None


def is_finished(name: str) -> bool:
    """Whether the name is that of a checkpoint whose save was finished."""
    found = CheckpointName.parse(name)
    return found is not None and found.finished


def partial_name(name: str) -> str:
    """The temporary name of a checkpoint while a tool writes it."""
    return f".{name}.partial"


def replaced_name(name: str) -> str:
    """The temporary name of a checkpoint that was replaced, until it is deleted."""
    return f".{name}.replaced"


def finished_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in a folder, ascending; empty if there is no such folder.

    Raises:
        OSError: it cannot be listed.
    """
    try:
        found = [CheckpointName.parse(path.name) for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name.step for name in found if name is not None and name.finished)
