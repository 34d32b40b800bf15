"""Tells a whole checkpoint from a torn one: a file that lists every other file with its size and SHA-256.

All ranks share the reading; the folder has to be on storage that all of them see.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from coe_megatron.parallel.collective import Group, from_first, gathered, share, together

SEAL = "complete.json"


def seal(folder: Path, group: Group = None) -> None:
    """Write the list of a folder's files into it; collective, after all ranks have written theirs."""
    files = from_first(lambda: _files(folder), group)
    own: list[tuple[str, dict]] = []
    together(lambda: own.extend((name, _describe(folder / name)) for name in share(files)), group)
    entries = dict(sorted(gathered(own, group)))
    together(lambda: write_text(folder / SEAL, _sealed(entries)), group, first_alone=True)


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is whole; collective, the same answer on all ranks."""
    listed = from_first(lambda: _read_seal(folder))
    if isinstance(listed, str):
        return listed
    found = [_difference(folder / name, name, listed[name]) for name in share(sorted(listed))]
    return next((difference for difference in gathered(found) if difference), None)


def write_text(path: Path, text: str) -> None:
    """Write a file that is on the disk, not only on its way there, when this returns."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """The same for bytes."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _sealed(files: dict[str, dict]) -> str:
    """The seal's own text. It vouches for itself as well: one of other words, digits or blanks is not this one."""
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": digest}, indent=1)


def _read_seal(folder: Path) -> dict[str, dict] | str:
    """The files a checkpoint should have, or why that is not known."""
    try:
        text = (folder / SEAL).read_bytes().decode()  # read_text would pass over the kind of a line break
        files = json.loads(text)["files"]
    except FileNotFoundError:
        return f"{SEAL} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{SEAL} cannot be read"
    return files if text == _sealed(files) else f"the content of {SEAL} has changed"


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
