"""Tells a whole checkpoint from a torn one: a file that lists every other file with its size and SHA-256.

All ranks share the reading; the folder has to be on storage that all of them see.
"""

import hashlib
import json
import os
import stat
from collections.abc import Container
from pathlib import Path
from typing import Any, TypeAlias

from coe_megatron.distributed.collectives import Group, all_gather, run_on_all, run_on_rank0, shard
from coe_megatron.errors import ConfigError
from coe_megatron.files import read_limited, write_atomically
from coe_megatron.parsing import parse_json

SEAL = "complete.json"
PARTS = ".distcp"  # ends the names of files with tensors' numbers, which alone may be large
_LARGEST = 1 << 26  # bytes of any other
_LARGEST_SEAL = 1 << 22  # of 4,096 ranks it has a quarter of these bytes
Entry: TypeAlias = dict[str, Any]  # "bytes" and "sha256" of a file


def seal(folder: Path, group: Group = None) -> None:
    """Write the list of a folder's files into it; collective, after all ranks have written theirs."""
    files = run_on_rank0(lambda: _files(folder), group)
    own: list[tuple[str, Entry]] = []
    run_on_all(lambda: own.extend((name, _describe(folder / name)) for name in shard(files)), group)
    entries = dict(sorted(all_gather(own, group)))
    run_on_rank0(lambda: write_atomically(folder / SEAL, _sealed(entries)), group)


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is whole; collective, the same answer on all ranks."""
    try:
        files = run_on_rank0(lambda: listed(folder))
    except ConfigError as error:
        return str(error)
    found = [_difference(folder / name, name, files[name]) for name in shard(sorted(files))]
    return next((difference for difference in all_gather(found) if difference), None)


def listed(folder: Path) -> dict[str, Entry]:
    """The files of a checkpoint, by their paths in it; that they are plain files, and all there are. Not collective.

    Raises:
        ConfigError: the list cannot be read or has changed, or there is something else than it says.
    """
    files = _read_seal(folder)
    folders = {name.rpartition("/")[0] for name in files}
    missing = set(files)
    for inner in sorted({"", *folders}):  # the checkpoint's own folder first, so that no link is followed
        missing -= _plain_files(folder, inner, files, folders)
    if missing:
        raise ConfigError(f"{min(missing)} is missing")
    return files


def _plain_files(folder: Path, inner: str, files: Container[str], folders: Container[str]) -> set[str]:
    """The files in one of a checkpoint's folders, which has to hold nothing that is not listed."""
    found = set()
    try:
        with os.scandir(folder / inner) as entries:
            for entry in entries:
                name = f"{inner}/{entry.name}".lstrip("/")
                if name in files:
                    found.add(_own(name, "file", entry.is_file(follow_symlinks=False)))
                elif name in folders:
                    _own(name, "folder", entry.is_dir(follow_symlinks=False))
                elif name != SEAL:
                    raise ConfigError(f"it holds {name}, which {SEAL} does not list")
    except FileNotFoundError:
        pass  # its files are missing
    except OSError as error:
        raise ConfigError(f"{inner or 'it'} cannot be read: {(error.strerror or str(error)).lower()}") from None
    return found


def _own(name: str, kind: str, met: bool) -> str:
    if not met:
        raise ConfigError(f"{name} is a link or of another kind, and no plain {kind} of the checkpoint's own")
    return name


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _sealed(files: dict[str, Entry]) -> str:
    """The seal's own text. It vouches for itself as well: one of other words, digits or blanks is not this one."""
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": digest}, indent=1)


def _read_seal(folder: Path) -> dict[str, Entry]:
    """The files a checkpoint should have, from a list that is as it was written."""
    try:
        _own(SEAL, "file", stat.S_ISREG(os.lstat(folder / SEAL).st_mode))
    except FileNotFoundError:
        raise ConfigError(f"{SEAL} is missing") from None
    except OSError as error:
        raise ConfigError(f"{SEAL} cannot be read: {(error.strerror or str(error)).lower()}") from None
    content = read_limited(folder / SEAL, SEAL, _LARGEST_SEAL)
    try:
        found = parse_json(content)
    except ValueError as error:
        raise ConfigError(f"{SEAL} cannot be read: {error}") from None
    files = found.get("files") if type(found) is dict else None
    if type(files) is not dict or not all(_is_entry(name, entry) for name, entry in files.items()):
        raise ConfigError(f"{SEAL} cannot be read: it is no list of a checkpoint's files")
    if content != _sealed(files).encode():
        raise ConfigError(f"the content of {SEAL} has changed")
    return files


def _is_entry(name: str, entry: Any) -> bool:
    """A file in the checkpoint's folder or in one of its folders, with size and SHA-256."""
    parts = name.split("/")
    inside = len(parts) <= 2 and name.isprintable() and not {"", ".", "..", SEAL} & {*parts}
    described = type(entry) is dict and entry.keys() == {"bytes", "sha256"}
    return inside and described and type(entry["bytes"]) is int and type(entry["sha256"]) is str


def _difference(path: Path, name: str, entry: Entry) -> str | None:
    """How a file differs from what was written; its content is only read if its size is right."""
    try:
        size = path.lstat().st_size
        if size != entry["bytes"]:
            return f"{name} has {size} bytes instead of {entry['bytes']}"
        if size > _LARGEST and not name.endswith(PARTS):
            return f"{name} has {size} bytes, which is too much for what it should hold"
        return None if _describe(path) == entry else f"the content of {name} has changed"
    except OSError as error:
        return f"{name} cannot be read: {(error.strerror or str(error)).lower()}"


def _describe(path: Path) -> Entry:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
