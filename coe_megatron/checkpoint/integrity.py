"""Detects incomplete and damaged checkpoints: a manifest lists every other file with its size and SHA-256.

The ranks divide the reading among them; the folder must be on storage that all ranks share.
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

MANIFEST = "complete.json"
SHARD_SUFFIX = ".distcp"  # of the files with tensor data; only these may be large
_MAX_FILE_BYTES = 1 << 26  # of any other file
MAX_MANIFEST_BYTES = 1 << 25  # six times what 16,384 ranks need
Entry: TypeAlias = dict[str, Any]  # "bytes" and "sha256" of a file


def write_manifest(folder: Path, group: Group = None) -> None:
    """Write the manifest of a folder; collective, after all ranks have written their files."""
    files = run_on_rank0(lambda: _files(folder), group)
    own: list[tuple[str, Entry]] = []
    run_on_all(lambda: own.extend((name, _describe(folder / name)) for name in shard(files)), group)
    entries = dict(sorted(all_gather(own, group)))
    run_on_rank0(lambda: write_atomically(folder / MANIFEST, manifest_text(entries)), group)


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is complete. Collective, the same result on all ranks."""
    try:
        files = run_on_rank0(lambda: manifest_files(folder))
    except ConfigError as error:
        return str(error)
    found = [_difference(folder / name, name, files[name]) for name in shard(sorted(files))]
    return next((difference for difference in all_gather(found) if difference), None)


def manifest_files(folder: Path) -> dict[str, Entry]:
    """The files in a checkpoint's manifest, by relative path; checks that exactly these exist. Not collective.

    Raises:
        ConfigError: the manifest cannot be read or was changed, or a file is missing, additional or not a regular file.
    """
    files = _read_manifest(folder)
    folders = {name.rpartition("/")[0] for name in files}
    missing = set(files)
    for inner in sorted({"", *folders}):  # the checkpoint itself first, so that no link is followed
        missing -= _regular_files(folder, inner, files, folders)
    if missing:
        raise ConfigError(f"{min(missing)} is missing")
    return files


def _regular_files(folder: Path, inner: str, files: Container[str], folders: Container[str]) -> set[str]:
    """The files in one folder of a checkpoint; refuses what the manifest does not list."""
    found = set()
    try:
        with os.scandir(folder / inner) as entries:
            for entry in entries:
                name = f"{inner}/{entry.name}".lstrip("/")
                if name in files:
                    found.add(_require_regular(name, "file", entry.is_file(follow_symlinks=False)))
                elif name in folders:
                    _require_regular(name, "folder", entry.is_dir(follow_symlinks=False))
                elif name != MANIFEST:
                    raise ConfigError(f"it holds {name}, which {MANIFEST} does not list")
    except FileNotFoundError:
        pass  # the caller reports its files as missing
    except OSError as error:
        raise ConfigError(f"{inner or 'it'} cannot be read: {(error.strerror or str(error)).lower()}") from None
    return found


def _require_regular(name: str, kind: str, is_regular: bool) -> str:
    if not is_regular:
        raise ConfigError(f"{name} is a link or special file, not a regular {kind}")
    return name


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def manifest_text(files: dict[str, Entry]) -> str:
    """The manifest's text, including a checksum of its entries; changed text is refused."""
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": digest}, indent=1)


def _read_manifest(folder: Path) -> dict[str, Entry]:
    """The entries of a checkpoint's manifest, after checking the manifest's own checksum."""
    try:
        _require_regular(MANIFEST, "file", stat.S_ISREG(os.lstat(folder / MANIFEST).st_mode))
    except FileNotFoundError:
        raise ConfigError(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise ConfigError(f"{MANIFEST} cannot be read: {(error.strerror or str(error)).lower()}") from None
    content = read_limited(folder / MANIFEST, MANIFEST, MAX_MANIFEST_BYTES)
    try:
        found = parse_json(content)
    except ValueError as error:
        raise ConfigError(f"{MANIFEST} cannot be read: {error}") from None
    files = found.get("files") if type(found) is dict else None
    if type(files) is not dict or not all(_is_entry(name, entry) for name, entry in files.items()):
        raise ConfigError(f"{MANIFEST} cannot be read: it is not a list of checkpoint files")
    if content != manifest_text(files).encode():
        raise ConfigError(f"the content of {MANIFEST} has changed")
    return files


def _is_entry(name: str, entry: Any) -> bool:
    """Whether an entry names a file in the checkpoint or a subfolder of it, with size and SHA-256."""
    parts = name.split("/")
    inside = len(parts) <= 2 and name.isprintable() and not {"", ".", "..", MANIFEST} & {*parts}
    described = type(entry) is dict and entry.keys() == {"bytes", "sha256"}
    return inside and described and type(entry["bytes"]) is int and type(entry["sha256"]) is str


def _difference(path: Path, name: str, entry: Entry) -> str | None:
    """How a file differs from its manifest entry; reads the content only if the size is right."""
    try:
        size = path.lstat().st_size
        if size != entry["bytes"]:
            return f"{name} has {size} bytes instead of {entry['bytes']}"
        if size > _MAX_FILE_BYTES and not name.endswith(SHARD_SUFFIX):
            return f"{name} has {size} bytes, which is too large for its kind"
        return None if _describe(path) == entry else f"the content of {name} has changed"
    except OSError as error:
        return f"{name} cannot be read: {(error.strerror or str(error)).lower()}"


def _describe(path: Path) -> Entry:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
