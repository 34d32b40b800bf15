"""Tells a whole checkpoint from a torn one: a file that lists every other file with its size and SHA-256.

All ranks share the reading; the folder has to be on storage that all of them see.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

SEAL = "complete.json"


def seal(folder: Path) -> None:
    """Write the list of a folder's files into it; collective, after all ranks have written theirs."""
    files = shared(sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
    entries = gathered([(name, _describe(folder / name)) for name in _share(files)])
    if dist.get_rank() == 0:
        write_json(folder / SEAL, {"files": dict(sorted(entries))})


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is whole; collective, the same answer on all ranks."""
    listed = shared(_read_seal(folder))
    if isinstance(listed, str):
        return listed
    found = [_difference(folder / name, name, listed[name]) for name in _share(sorted(listed))]
    return next((difference for difference in gathered(found) if difference), None)


def write_json(path: Path, value: Any) -> None:
    """Write JSON that is on the disk, not only on its way there, when this returns."""
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _read_seal(folder: Path) -> dict[str, dict] | str:
    """The files a checkpoint should have, or why that is not known."""
    try:
        return dict(json.loads((folder / SEAL).read_text())["files"])
    except FileNotFoundError:
        return f"{SEAL} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{SEAL} cannot be read"


def _difference(path: Path, name: str, listed: dict) -> str | None:
    """How a file differs from what was written; its content is only read if its size is right."""
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != listed["bytes"]:
        return f"{name} has {path.stat().st_size} bytes instead of {listed['bytes']}"
    return None if _describe(path) == listed else f"the content of {name} has changed"


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def shared(value: Any) -> Any:
    """Rank 0's value on all ranks."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def _share(items: Sequence) -> Sequence:
    """This rank's part of a list that all ranks have."""
    return items[dist.get_rank() :: dist.get_world_size()]


def gathered(items: list) -> list:
    """What all ranks have, in one list."""
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]
