"""Looks at checkpoints and makes new ones of them, in one process, without a model, a GPU or process groups.

What is made is sealed like any other checkpoint, appears under its name at once, and holds the parts that the tensors
were saved in: no more than one part of each is in memory.
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
from coe_megatron.checkpoint.integrity import SEAL, listed, seal
from coe_megatron.checkpoint.metadata import METADATA, CheckpointMetadata
from coe_megatron.checkpoint.names import partial_name
from coe_megatron.checkpoint.storage import MASTER, OPTIMIZER, Entries, Reader
from coe_megatron.errors import ConfigError
from coe_megatron.files import remove, require_writable, write_atomically
from coe_megatron.text import aligned, aligned_facts

_LONGEST_SUFFIX = len("..replaced")  # that the name of a checkpoint gets while it is made


@dataclass(frozen=True)
class Tensor:
    """Shape and type of a whole tensor, and the number of parts it is stored in."""

    shape: list[int]
    dtype: str
    parts: int


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds; `facts` is what the run that saved it noted."""

    checkpoint: Path
    facts: CheckpointMetadata
    age_seconds: float
    files: int
    bytes: int
    parameters: int
    tensors: dict[str, Tensor]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "checkpoint": str(self.checkpoint), "facts": self.facts.as_dict()}

    def table(self) -> str:
        """For a person: the optimizer's states, shaped like the weights, are not listed one by one."""
        weights = {key: tensor for key, tensor in self.tensors.items() if not key.startswith(OPTIMIZER)}
        state, made_of = self.facts.state, self.facts.made_of
        whole = self.facts.optimizer_steps is not None
        rows = {
            "checkpoint": self.checkpoint,
            "step": f"{state.get('step', 0):,}, after {state.get('tokens', 0):,} tokens",
            "age": _duration(self.age_seconds),
            "saved from": ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in asdict(self.facts.layout).items()),
            **({"made of": ", ".join(made_of)} if made_of else {}),
            "parameters": f"{self.parameters:,}, with " + ("AdamW's states" if whole else "fp32 masters alone"),
            "size": f"{self.bytes / 1e6:,.1f} MB in {self.files} files",
        }
        tensors = [(key, held.dtype, " x ".join(map(str, held.shape))) for key, held in sorted(weights.items())]
        return "\n".join([aligned_facts(rows), "", *aligned(tensors, "<")])


def inspect(source: Path) -> Contents:
    """What a checkpoint holds, or the newest finished one of a run's folder; its files are not verified.

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
    files = [checkpoint / name for name in (*listed(checkpoint), SEAL)]
    facts, entries = CheckpointMetadata.read(checkpoint), Reader(checkpoint / "tensors").entries
    return Contents(
        checkpoint,
        facts,
        age_seconds=time.time() - (checkpoint / SEAL).stat().st_mtime,
        files=len(files),
        bytes=sum(path.stat().st_size for path in files),
        parameters=sum(entry.size.numel() for key, entry in entries.items() if key.startswith(MASTER)),
        tensors={
            key: Tensor(list(entry.size), str(entry.properties.dtype).removeprefix("torch."), len(entry.chunks))
            for key, entry in entries.items()
        },
    )


def verify(source: Path) -> Iterator[tuple[Path, str | None]]:
    """One checkpoint, or all of a run's folder from the newest on, each with what is wrong with it (None if whole).

    Raises:
        ConfigError: there is none.
    """
    for checkpoint in [source] if listing.is_checkpoint(source) else _listed(source):
        yield checkpoint, listing.trouble(checkpoint)


def reshard(source: Path, out: Path, files: int = 1, weights_only: bool = False, overwrite: bool = False) -> Path:
    """Write a checkpoint anew, its tensors in `files` files; with `weights_only` without AdamW's moments.

    Raises:
        ConfigError: `source` is no whole checkpoint; `out` exists, and `overwrite` is not asked for or it is none; or
            it cannot be written.
    """
    checkpoint = listing.find(source)
    reader, facts = Reader(checkpoint / "tensors"), CheckpointMetadata.read(checkpoint)
    with _making(out, overwrite, [checkpoint]) as folder:
        if weights_only:
            facts = replace(facts, optimizer_steps=None, made_of=[checkpoint.name])
        else:
            _copy_random(checkpoint, folder)
        write_atomically(folder / METADATA, facts.as_json())
        entries = _without_moments(reader.entries) if weights_only else reader.entries
        storage.write(folder / "tensors", entries, reader.part, files)
    return out


def average(sources: Sequence[Path], out: Path, overwrite: bool = False) -> Path:
    """Write the mean of the weights of several checkpoints, to begin another run with (`training.warm_start`).

    The fp32 masters are averaged, and the weights are these in their type. Moments are left out; position and tokens
    are those of the newest.

    Raises:
        ConfigError: fewer than two, not all whole, of different models or tokenizers; or `out` as in `reshard`.
    """
    if len(sources) < 2:
        raise ConfigError(f"{len(sources)} checkpoint given: a mean needs two")
    found = [(checkpoint, CheckpointMetadata.read(checkpoint)) for checkpoint in map(listing.find, sources)]
    found.sort(key=lambda each: each[1].state.get("step", 0))
    checkpoints, (*_, facts) = zip(*found, strict=True)
    readers = [Reader(checkpoint / "tensors") for checkpoint in checkpoints]
    _require_alike(found, readers)
    with _making(out, overwrite, checkpoints) as folder:
        facts = replace(facts, optimizer_steps=None, made_of=[checkpoint.name for checkpoint in checkpoints])
        write_atomically(folder / METADATA, facts.as_json())
        storage.write(folder / "tensors", _without_moments(readers[-1].entries), partial(_mean, readers))
    return out


def newest(folder: Path, count: int) -> list[Path]:
    """The newest `count` checkpoints of a run's folder.

    Raises:
        ConfigError: there are fewer, or one of them is not whole.
    """
    finished = [checkpoint for checkpoint in _listed(folder) if listing.finished(checkpoint)]
    if len(finished) < count:
        raise ConfigError(f"{folder} holds {len(finished)} finished checkpoints, and {count} are asked for")
    return [listing.find(checkpoint) for checkpoint in finished[:count]]


def _listed(source: Path) -> list[Path]:
    if found := listing.newest_first(listing.checkpoints_of(source)):
        return found
    raise ConfigError(f"{source} holds no checkpoint: name one, or the folder of a run that saved one")


def _without_moments(entries: Entries) -> Entries:
    return {key: entry for key, entry in entries.items() if key.startswith(MASTER) or not key.startswith(OPTIMIZER)}


def _require_alike(found: Sequence[tuple[Path, CheckpointMetadata]], readers: Sequence[Reader]) -> None:
    model, tokenizer = (
        [{key: entry.size for key, entry in _without_moments(reader.entries).items()} for reader in readers],
        [facts.state.get("tokenizer") for _, facts in found],
    )
    for what, held in (("model", model), ("tokenizer", tokenizer)):
        for (checkpoint, _), its in zip(found, held, strict=True):
            if its != held[-1]:
                raise ConfigError(f"{checkpoint} is of another {what} than {found[-1][0]}: a mean makes no sense")


def _mean(readers: Sequence[Reader], key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
    """Of masters; of a weight its master's in the weight's type; of a buffer of integers the newest."""
    newest = readers[-1]
    averaged = MASTER + key if MASTER + key in newest.entries else key
    dtype = newest.entries[averaged].properties.dtype
    if not dtype.is_floating_point:
        return newest.part(key, chunk)
    total = torch.zeros(chunk.sizes, dtype=torch.float64)
    for reader in readers:
        total += reader.part(averaged, chunk)
    return (total / len(readers)).to(dtype).to(newest.entries[key].properties.dtype)


def _copy_random(checkpoint: Path, folder: Path) -> None:
    """The files of generators' states that the checkpoint lists, all of them plain files."""
    for name in listed(checkpoint):
        if name.startswith("random/"):
            (folder / "random").mkdir(exist_ok=True)
            shutil.copyfile(checkpoint / name, folder / name, follow_symlinks=False)


@contextmanager
def _making(out: Path, overwrite: bool, sources: Sequence[Path]) -> Iterator[Path]:
    """A folder to fill, which is then sealed and takes the name `out`; of an attempt that fails nothing is left."""
    _require_out(out, overwrite, sources)
    folder = out.absolute().with_name(partial_name(out.absolute().name))
    try:
        try:
            remove(folder, ignore_errors=True)
            (folder / "tensors").mkdir(parents=True)
            yield folder
            seal(folder)
            listing.publish(folder, out)
        except BaseException:
            remove(folder, ignore_errors=True)
            raise
    except OSError as error:
        raise ConfigError(f"{out} could not be written: {error}") from error


def _require_out(out: Path, overwrite: bool, sources: Sequence[Path]) -> None:
    """Where a checkpoint may be written: nothing is lost there, and no checkpoint that is read has it inside."""
    require_writable(out, "OUT", "folder", spare=_LONGEST_SUFFIX)
    if os.path.lexists(out):
        if not overwrite:
            raise ConfigError(f"{out} exists: name another folder, or give --overwrite")
        if out.is_symlink() or not listing.is_checkpoint(out):
            raise ConfigError(f"{out} is no checkpoint, and is not replaced by one: name another folder")
    place = out.resolve()
    for source in (source.resolve() for source in sources):
        if place != source and (place in source.parents or source in place.parents):
            raise ConfigError(f"{out} and the checkpoint {source} lie in one another: name another folder")


def _duration(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} seconds"
