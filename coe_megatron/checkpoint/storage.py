"""Folders of tensors in torch's distributed format (Megatron's torch_dist), part by part and without process groups.

    .metadata         every tensor's shape, type and parts, and where each part lies
    __R_F.distcp      parts, one after the other: file F of rank R

`.metadata` is a pickle, and unpickling can run any code. It is read with the few classes that such a list is made of;
one that asks for another is refused. That keeps out byte entries as well, which torch would unpickle without a list.
The parts are tensors for `torch.load(weights_only=True)`.
"""

import io
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.serialization import _get_layout

from coe_megatron.parallel.collective import said_by_the_disk

LIST = ".metadata"
OPTIMIZER = "optimizer."  # AdamW's states are named `optimizer.<kind>.<key of the weight>`
MASTER = f"{OPTIMIZER}fp32_param."
_CLASSES = (
    ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta, TensorProperties, TensorStorageMetadata,
    _MEM_FORMAT_ENCODING, _StorageInfo, _get_layout,
)  # fmt: skip
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_ALLOWED: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    **{(known.__module__, known.__name__): known for known in _CLASSES},
}
Make = Callable[[str, ChunkStorageMetadata], torch.Tensor]
Entries = Mapping[str, TensorStorageMetadata]


class Reader(dcp.FileSystemReader):
    """Reads a folder of tensors, through torch's and Megatron's own calls too; `.metadata` goes through the allow-list.

    Args:
        content: of `.metadata`, where another rank has read it for all (`read_list`).

    Raises:
        ValueError: `.metadata` cannot be read, or asks for more than a list of tensors needs.
    """

    def __init__(self, folder: Path, content: bytes | None = None) -> None:
        super().__init__(folder)
        self.folder = folder
        self._metadata = _parsed(read_list(folder) if content is None else content, folder)
        self.storage_data = self._metadata.storage_data
        self.entries: dict[str, TensorStorageMetadata] = self._metadata.state_dict_metadata  # type: ignore[assignment]

    def read_metadata(self) -> Metadata:
        """What torch's own reader unpickles here."""
        return self._metadata

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
            raise said_by_the_disk(error) from error


def refusal(folder: Path) -> str | None:
    """Why the list of a folder's tensors is not read, None if it can be."""
    try:
        _parsed(read_list(folder), folder)
    except ValueError as error:
        return str(error)
    return None


def read_list(folder: Path) -> bytes:
    """The content of a folder's `.metadata`.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return (folder / LIST).read_bytes()
    except OSError as error:
        raise ValueError(f"{folder.name}/{LIST} is no list of tensors") from error


def write(folder: Path, entries: Entries, make: Make, files: int = 1) -> None:
    """Write tensors whose parts `make(key, chunk)` hands out one by one; no more than one of each tensor is kept.

    Args:
        folder: an empty one.
        entries: shape, type and parts of every tensor.
        files: over how many files the parts are spread, evenly by size.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save({}, storage_writer=Writer(folder, files), planner=_PartByPart(entries, make), no_dist=True)


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


class _Refused(ValueError):
    pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _Refused(f"{module}.{name}")
        return _ALLOWED[module, name]


def _parsed(content: bytes, folder: Path) -> Metadata:
    shown = f"{folder.name}/{LIST}"
    try:
        found = _Unpickler(io.BytesIO(content)).load()
        _require_list(found)
    except _Refused as error:
        raise ValueError(f"{shown} asks for {error}, of which no list of tensors is made") from error
    except Exception as error:  # a pickle that is none can fail in any way
        raise ValueError(f"{shown} is no list of tensors") from error
    return found


def _require_list(found: Any) -> None:
    assert type(found) is Metadata
    assert all(type(entry) is TensorStorageMetadata for entry in found.state_dict_metadata.values())
    for place in found.storage_data.values():
        if Path(place.relative_path).name != place.relative_path:
            raise _Refused(f"the file {place.relative_path}")
