"""Inspects, verifies, reshards and averages checkpoints in one process, without a model, a GPU or process groups.

A new checkpoint has a manifest like any other and appears under its name only when it is complete. Its tensors keep the
parts that they were saved in, and only one part is in memory at a time.
"""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from coe_megatron.checkpoint import listing, storage
from coe_megatron.checkpoint.integrity import MANIFEST, manifest_files, write_manifest
from coe_megatron.checkpoint.metadata import METADATA, CheckpointMetadata
from coe_megatron.checkpoint.storage import MASTER, OPTIMIZER, Entries, Reader
from coe_megatron.errors import ConfigError
from coe_megatron.files import require_writable, write_atomically
from coe_megatron.text import aligned, aligned_facts

_SUFFIX_LENGTH = len("..replaced")  # longest addition to the name of a checkpoint while it is written


@dataclass(frozen=True)
class Tensor:
    """Shape and dtype of a full tensor, and the number of its stored parts."""

    shape: list[int]
    dtype: str
    parts: int


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds."""

    checkpoint: Path
    metadata: CheckpointMetadata
    age_seconds: float
    files: int
    bytes: int
    parameters: int
    tensors: dict[str, Tensor]

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "checkpoint": str(self.checkpoint), "metadata": self.metadata.as_dict()}

    def table(self) -> str:
        """A text table; it omits the optimizer states, which have the shapes of the weights."""
        weights = {key: tensor for key, tensor in self.tensors.items() if not key.startswith(OPTIMIZER)}
        state, derived_from = self.metadata.state, self.metadata.derived_from
        has_moments = self.metadata.optimizer_steps is not None
        rows = {
            "checkpoint": self.checkpoint,
            "step": f"{state.get('step', 0):,}, after {state.get('tokens', 0):,} tokens",
            "age": _duration(self.age_seconds),
            "layout": ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in asdict(self.metadata.layout).items()),
            **({"derived from": ", ".join(derived_from)} if derived_from else {}),
            "parameters": f"{self.parameters:,}, with " + ("AdamW's states" if has_moments else "fp32 masters only"),
            "size": f"{self.bytes / 1e6:,.1f} MB in {self.files} files",
        }
        tensors = [(key, held.dtype, " x ".join(map(str, held.shape))) for key, held in sorted(weights.items())]
        return "\n".join([aligned_facts(rows), "", *aligned(tensors, "<")])


def inspect(source: Path) -> Contents:
    """Describe a checkpoint, or a run's most recent finished one, without verifying its files.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    checkpoint = source
    if not listing.is_checkpoint(source):
        finished = [found for found in _listed(source) if listing.finished(found)]
        if not finished:
            raise ConfigError(f"{source} holds no finished checkpoint")
        checkpoint = finished[0]
    try:
        return _contents(checkpoint)
    except ConfigError as error:
        raise ConfigError(f"checkpoint {checkpoint} is damaged: {error}") from error


def _contents(checkpoint: Path) -> Contents:
    files = [checkpoint / name for name in (*manifest_files(checkpoint), MANIFEST)]
    metadata, entries = CheckpointMetadata.read(checkpoint), Reader(checkpoint / "tensors").entries
    return Contents(
        checkpoint,
        metadata,
        age_seconds=time.time() - (checkpoint / MANIFEST).stat().st_mtime,
        files=len(files),
        bytes=sum(path.stat().st_size for path in files),
        parameters=sum(entry.size.numel() for key, entry in entries.items() if key.startswith(MASTER)),
        tensors={
            key: Tensor(list(entry.size), str(entry.properties.dtype).removeprefix("torch."), len(entry.chunks))
            for key, entry in entries.items()
        },
    )


def verify(source: Path) -> Iterator[tuple[Path, str | None]]:
    """Verify a checkpoint, or all of a run, most recent first; yields each with its problem, None if complete.

    Raises:
        ConfigError: there is none.
    """
    for checkpoint in [source] if listing.is_checkpoint(source) else _listed(source):
        yield checkpoint, listing.problem(checkpoint)


def reshard(source: Path, out: Path, files: int = 1, weights_only: bool = False, overwrite: bool = False) -> Path:
    """Rewrite a checkpoint with its tensors in `files` files; with `weights_only`, without AdamW's moments.

    Raises:
        ConfigError: `source` is not a complete checkpoint; `out` exists and `overwrite` is False, or `out` is not a
            checkpoint; or `out` cannot be written.
    """
    checkpoint = listing.find(source)
    reader, metadata = Reader(checkpoint / "tensors"), CheckpointMetadata.read(checkpoint)
    with new_checkpoint(out, overwrite, [checkpoint]) as folder:
        if weights_only:
            metadata = replace(metadata, optimizer_steps=None, derived_from=[checkpoint.name])
        else:
            _copy_random(checkpoint, folder)
        write_atomically(folder / METADATA, metadata.as_json())
        entries = without_moments(reader.entries) if weights_only else reader.entries
        storage.write(folder / "tensors", entries, reader.part, files)
    return out


def average(sources: Sequence[Path], out: Path, overwrite: bool = False) -> Path:
    """Average the weights of several checkpoints, to start another run from (`training.warm_start`).

    This averages the fp32 masters and casts them to the dtype of the weights. The result has no moments; step and
    tokens are those of the most recent checkpoint.

    Raises:
        ConfigError: there are fewer than two; one is not complete; models or tokenizers differ; or `out` as in
            `reshard`.
    """
    if len(sources) < 2:
        raise ConfigError(f"{len(sources)} checkpoint given: an average needs two")
    found = [(checkpoint, CheckpointMetadata.read(checkpoint)) for checkpoint in map(listing.find, sources)]
    found.sort(key=lambda each: each[1].state.get("step", 0))
    checkpoints, (*_, metadata) = zip(*found, strict=True)
    readers = [Reader(checkpoint / "tensors") for checkpoint in checkpoints]
    _require_same_model(found, readers)
    with new_checkpoint(out, overwrite, checkpoints) as folder:
        metadata = replace(metadata, optimizer_steps=None, derived_from=[checkpoint.name for checkpoint in checkpoints])
        write_atomically(folder / METADATA, metadata.as_json())
        storage.write(folder / "tensors", without_moments(readers[-1].entries), partial(_mean, readers))
    return out


def latest(folder: Path, count: int) -> list[Path]:
    """The most recent `count` finished checkpoints of a run.

    Raises:
        ConfigError: there are fewer, or one of them is not complete.
    """
    finished = [checkpoint for checkpoint in _listed(folder) if listing.finished(checkpoint)]
    if len(finished) < count:
        raise ConfigError(f"{folder} holds {len(finished)} finished checkpoints, but {count} are requested")
    return [listing.find(checkpoint) for checkpoint in finished[:count]]


def _listed(source: Path) -> list[Path]:
    if found := listing.newest_first(listing.checkpoints_of(source)):
        return found
    raise ConfigError(f"{source} holds no checkpoint: name one, or the folder of a run that saved one")


def without_moments(entries: Entries) -> Entries:
    return {key: entry for key, entry in entries.items() if key.startswith(MASTER) or not key.startswith(OPTIMIZER)}


def _require_same_model(found: Sequence[tuple[Path, CheckpointMetadata]], readers: Sequence[Reader]) -> None:
    model, tokenizer = (
        [{key: entry.size for key, entry in without_moments(reader.entries).items()} for reader in readers],
        [metadata.state.get("tokenizer") for _, metadata in found],
    )
    for what, values in (("model", model), ("tokenizer", tokenizer)):
        for (checkpoint, _), its in zip(found, values, strict=True):
            if its != values[-1]:
                raise ConfigError(f"{checkpoint} is of another {what} than {found[-1][0]}: they cannot be averaged")


def _mean(readers: Sequence[Reader], key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
    """The mean of masters; for a weight the mean of its master, cast; for an integer buffer the most recent value."""
    latest = readers[-1]
    averaged = MASTER + key if MASTER + key in latest.entries else key
    dtype = latest.entries[averaged].properties.dtype
    if not dtype.is_floating_point:
        return latest.part(key, chunk)
    total = torch.zeros(chunk.sizes, dtype=torch.float64)
    for reader in readers:
        total += reader.part(averaged, chunk)
    return (total / len(readers)).to(dtype).to(latest.entries[key].properties.dtype)


def _copy_random(checkpoint: Path, folder: Path) -> None:
    """Copy the RNG states that the manifest lists."""
    for name in manifest_files(checkpoint):
        if name.startswith("random/"):
            (folder / "random").mkdir(exist_ok=True)
            shutil.copyfile(checkpoint / name, folder / name, follow_symlinks=False)


@contextmanager
def new_checkpoint(out: Path, overwrite: bool, sources: Sequence[Path]) -> Iterator[Path]:
    """A folder to fill; it then gets a manifest and the name `out`. After an error nothing is left behind."""
    _require_out(out, overwrite, sources)
    try:
        with listing.unpublished(out) as folder:
            (folder / "tensors").mkdir()
            yield folder
            write_manifest(folder)
    except OSError as error:
        raise ConfigError(f"{out} could not be written: {error}") from error


def _require_out(out: Path, overwrite: bool, sources: Sequence[Path]) -> None:
    """Check that writing `out` loses nothing, and that it is not inside a source or around one."""
    require_writable(out, "OUT", "folder", spare=_SUFFIX_LENGTH)
    if os.path.lexists(out):
        if not overwrite:
            raise ConfigError(f"{out} exists: name another folder, or use --overwrite")
        if out.is_symlink() or not listing.is_checkpoint(out):
            raise ConfigError(f"{out} is not a checkpoint and will not be replaced: name another folder")
    place = out.resolve()
    for source in (source.resolve() for source in sources):
        if place != source and (place in source.parents or source in place.parents):
            raise ConfigError(f"{out} and the checkpoint {source} contain each other: name another folder")


def _duration(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} seconds"
