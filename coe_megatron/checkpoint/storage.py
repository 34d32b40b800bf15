"""Folders of tensors in torch's distributed format (Megatron's torch_dist), part by part and without process groups.

    .metadata         every tensor's shape, type and parts, and where each part lies (`tensor_list.py`)
    __R_F.distcp      parts, one after the other: file F of rank R

The parts are tensors for `torch.load(weights_only=True)`, each looked into before (`saved.py`).
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

from coe_megatron.checkpoint.tensor_index import Listed
from coe_megatron.checkpoint.torch_file_check import SavedTensor, look_into
from coe_megatron.distributed.collectives import os_error_of
from coe_megatron.errors import ConfigError

OPTIMIZER = "optimizer."  # AdamW's states are named `optimizer.<kind>.<key of the weight>`
MASTER = f"{OPTIMIZER}fp32_param."
_LONGEST_LINE = 500  # of an error; torch explains at length
_FOR_MEGATRON = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
Make = Callable[[str, ChunkStorageMetadata], torch.Tensor]
Entries = Mapping[str, TensorStorageMetadata]


class Reader(dcp.FileSystemReader):
    """Reads a folder of tensors, through torch's and Megatron's own calls too; `.metadata` goes through the allow-list.

    Args:
        listed: where another rank has read it for all.

    Raises:
        ConfigError: `.metadata` cannot be read, asks for more than a list of tensors needs, or does not suit the files.
    """

    def __init__(self, folder: Path, listed: Listed | None = None) -> None:
        super().__init__(folder)
        self.folder = folder
        self._metadata = (listed or Listed.read(folder)).parsed()
        self.storage_data = self._metadata.storage_data
        self.entries: dict[str, TensorStorageMetadata] = self._metadata.state_dict_metadata  # type: ignore[assignment]

    def read_metadata(self) -> Metadata:
        """What torch's own reader unpickles here."""
        return self._metadata

    def parts(self) -> list[tuple[str, ChunkStorageMetadata]]:
        """All that are stored."""
        return [(key, chunk) for key, entry in self.entries.items() for chunk in entry.chunks]

    def problem(self, key: str, chunk: ChunkStorageMetadata) -> str | None:
        """Why a stored part is not what the list says, None if it is; its numbers are not read."""
        place = self.storage_data[MetadataIndex(key, chunk.offsets)]
        try:
            with (self.folder / place.relative_path).open("rb") as file:
                found = look_into(file, place.length, place.offset)
            if found != SavedTensor(self.entries[key].properties.dtype, chunk.sizes):
                raise ValueError("it is of another type or shape")
        except (OSError, ValueError) as error:
            return f"{self.folder.name}/{place.relative_path}: a part of {key} is damaged: {error}"
        return None

    def read_data(self, plan: LoadPlan, planner: dcp.LoadPlanner) -> Future[None]:
        """What torch does, with its errors about files in one line.

        Raises:
            ConfigError: the files hold something else than was written.
        """
        try:
            return super().read_data(plan, planner)
        except (RuntimeError, pickle.UnpicklingError, OSError) as error:
            raise ConfigError(f"a part in {self.folder} cannot be read: {error}"[:_LONGEST_LINE]) from error

    def part(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        """Any part of a tensor, in whatever parts it is stored; each of those it touches is in memory once."""
        entry = self.entries[key]
        out = torch.empty(chunk.sizes, dtype=entry.properties.dtype)
        items = create_read_items_for_chunk_list(key, entry, [chunk])
        self.read_data(LoadPlan(items), _Into(out))
        return out


class Writer(dcp.FileSystemWriter):
    """torch's writer, but two saves of equal tensors are equal files, and no error is lost.

    torch notes the path and a random number in `.metadata`; and what goes wrong in a thread of its own it forgets, so
    that a full disk would leave a list of tensors that are not there. Hence no such threads.
    """

    def __init__(self, folder: Path, files: int = 1) -> None:
        super().__init__(folder, thread_count=files, sync_files=True, per_thread_copy_ahead=0)

    def storage_meta(self) -> StorageMeta:
        """Nothing about this save."""
        return StorageMeta()

    def _write_data(self, planner: Any, file_queue: Any) -> Any:
        self.thread_count = 1  # until here it was the number of files
        try:
            return super()._write_data(planner, file_queue)
        except RuntimeError as error:
            raise os_error_of(error) from error


def write_for_megatron(folder: Path) -> None:
    """What Megatron's own way of loading looks for beside the tensors; ours needs neither."""
    common = io.BytesIO()
    torch.save({}, common)
    (folder / "common.pt").write_bytes(common.getvalue())
    (folder / "metadata.json").write_text(json.dumps(_FOR_MEGATRON))


def write(folder: Path, entries: Entries, make: Make, files: int = 1) -> None:
    """Write tensors whose parts `make(key, chunk)` hands out one by one; no more than one of each tensor is kept.

    Args:
        folder: an empty one.
        entries: shape, type and parts of every tensor.
        files: over how many files the parts are spread, evenly by size.

    Raises:
        OSError: they cannot be written.
        Exception: what `make` raised.
    """
    writer = Writer(folder, max(1, min(files, sum(len(entry.chunks) for entry in entries.values()))))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.save({}, storage_writer=writer, planner=_PartByPart(entries, make), no_dist=True)
        except CheckpointException as error:  # no Exception, and it has tracebacks in its text
            raise cause_of(error) from error
    write_for_megatron(folder)


def cause_of(error: CheckpointException) -> BaseException:
    """What went wrong on the first of the ranks where something did."""
    return next(iter(error.failures.values()))[0]


class _Into(dcp.DefaultLoadPlanner):
    """What is read goes into one tensor."""

    def __init__(self, out: torch.Tensor) -> None:
        super().__init__()
        self._out = out

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._out


class _PartByPart(dcp.DefaultSavePlanner):
    """A part is made when its turn comes to be written."""

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
