"""Folders of tensors in torch's distributed format (Megatron's torch_dist), part by part and without process groups.

    .metadata         every tensor's shape, dtype and parts, and the file of each part (`tensor_index.py`)
    __R_F.distcp      parts, one after the other: file F of rank R

`torch.load(weights_only=True)` reads each part after `torch_file_check.py` has checked it.
"""

import io
import json
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.futures import Future

from coe_megatron.checkpoint.tensor_index import TensorIndex
from coe_megatron.checkpoint.torch_file_check import SavedTensor, inspect_saved
from coe_megatron.distributed.collectives import os_error_of
from coe_megatron.errors import ConfigError
from coe_megatron.text import shortened

OPTIMIZER = "optimizer."  # AdamW's states are named `optimizer.<kind>.<key of the weight>`
MASTER = f"{OPTIMIZER}fp32_param."
_MAX_LINE = 500  # columns of an error; torch's messages are long
_FOR_MEGATRON = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
Make = Callable[[str, ChunkStorageMetadata], torch.Tensor]
Entries = Mapping[str, TensorStorageMetadata]


class Reader(dcp.FileSystemReader):
    """Reads a folder of tensors, also for torch's and Megatron's loaders; reads `.metadata` with an allow-list.

    Args:
        index: the index, if another rank has read it already.

    Raises:
        ConfigError: `.metadata` cannot be read, needs names that are not allowed, or does not match the files.
    """

    def __init__(self, folder: Path, index: TensorIndex | None = None) -> None:
        super().__init__(folder)
        self.folder = folder
        self._metadata = (index or TensorIndex.read(folder)).parse()
        self.storage_data = self._metadata.storage_data
        self.entries: dict[str, TensorStorageMetadata] = self._metadata.state_dict_metadata  # type: ignore[assignment]

    def read_metadata(self) -> Metadata:
        """The parsed index; torch's own reader would unpickle it here."""
        return self._metadata

    def parts(self) -> list[tuple[str, ChunkStorageMetadata]]:
        """All stored parts: key of the tensor, and chunk."""
        return [(key, chunk) for key, entry in self.entries.items() for chunk in entry.chunks]

    def problem(self, key: str, chunk: ChunkStorageMetadata) -> str | None:
        """How a stored part differs from the index; None if it does not. Does not read its data."""
        place = self.storage_data[MetadataIndex(key, chunk.offsets)]
        try:
            with (self.folder / place.relative_path).open("rb") as file:
                found = inspect_saved(file, place.length, place.offset)
            if found != SavedTensor(self.entries[key].properties.dtype, chunk.sizes):
                raise ValueError("it has another dtype or shape")
        except (OSError, ValueError) as error:
            return f"{self.folder.name}/{place.relative_path}: a part of {key} is damaged: {error}"
        return None

    def read_data(self, plan: LoadPlan, planner: dcp.LoadPlanner) -> Future[None]:
        """As torch does, with errors about files in one line.

        Raises:
            ConfigError: the files cannot be read or have changed.
        """
        try:
            return super().read_data(plan, planner)
        except (RuntimeError, pickle.UnpicklingError, OSError) as error:
            reason = shortened(str(error), _MAX_LINE)
            raise ConfigError(f"a part in {self.folder} cannot be read: {reason}") from error

    def part(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        """Read any part of a tensor, however it is stored; loads each stored part that it overlaps once."""
        entry = self.entries[key]
        out = torch.empty(chunk.sizes, dtype=entry.properties.dtype)
        items = create_read_items_for_chunk_list(key, entry, [chunk])
        self.read_data(LoadPlan(items), _Into(out))
        return out


class Writer(dcp.FileSystemWriter):
    """torch's writer, but equal tensors give equal files, and no error is lost.

    torch writes the path and a random number into `.metadata`. It also loses errors in its writer threads, so that a
    full disk would leave an index of tensors that were never written; so this writer uses no threads.
    """

    def __init__(self, folder: Path, files: int = 1) -> None:
        super().__init__(folder, thread_count=files, sync_files=True, per_thread_copy_ahead=0)

    def storage_meta(self) -> StorageMeta:
        """Empty, so that `.metadata` does not depend on the save."""
        return StorageMeta()

    def _write_data(self, planner: Any, file_queue: Any) -> Any:
        self.thread_count = 1  # torch uses it for the number of files as well
        try:
            return super()._write_data(planner, file_queue)
        except RuntimeError as error:
            raise os_error_of(error) from error


def write_for_megatron(folder: Path) -> None:
    """Write the extra files that Megatron's own loader expects; this project reads neither."""
    common = io.BytesIO()
    torch.save({}, common)
    (folder / "common.pt").write_bytes(common.getvalue())
    (folder / "metadata.json").write_text(json.dumps(_FOR_MEGATRON))


def write(folder: Path, entries: Entries, make: Make, files: int = 1) -> None:
    """Write tensors whose parts `make(key, chunk)` produces one by one; only one part is in memory at a time.

    Args:
        folder: is empty.
        entries: shape, dtype and parts of every tensor.
        files: number of files, filled evenly by size.

    Raises:
        OSError: they cannot be written.
        Exception: what `make` raised.
    """
    writer = Writer(folder, max(1, min(files, sum(len(entry.chunks) for entry in entries.values()))))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.save({}, storage_writer=writer, planner=_PartByPart(entries, make), no_dist=True)
        except CheckpointException as error:  # not an Exception; its text has tracebacks
            raise cause_of(error) from error
    write_for_megatron(folder)


def cause_of(error: CheckpointException) -> BaseException:
    """The error of the first rank that failed."""
    return next(iter(error.failures.values()))[0]


class _Into(dcp.DefaultLoadPlanner):
    """Reads into a single tensor."""

    def __init__(self, out: torch.Tensor) -> None:
        super().__init__()
        self._out = out

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._out


class _PartByPart(dcp.DefaultSavePlanner):
    """Produces each part only when it is written."""

    def __init__(self, entries: Entries, make: Make) -> None:
        super().__init__(flatten_state_dict=False)
        self._entries, self._make = entries, make

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(list(self._items()))
        return self.plan

    def _items(self) -> Iterator[WriteItem]:
        for key, entry in self._entries.items():
            for chunk in entry.chunks:
                data = TensorWriteData(chunk, entry.properties, entry.size)
                yield WriteItem(MetadataIndex(key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        assert write_item.tensor_data is not None
        return self._make(write_item.index.fqn, write_item.tensor_data.chunk)
