"""`.metadata` of a torch_dist folder: every tensor's shape, dtype and parts, and the file of each part.

It is a pickle, and unpickling can run any code, so `safe_unpickler.py` reads it with an allow-list of the few classes
that it needs. This also excludes byte entries, which torch would unpickle without a list. The index must match the
files next to it: each part is inside a file, and the parts cover each tensor without gap or overlap.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar

import torch
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
from torch.serialization import _get_layout

from coe_megatron.checkpoint.integrity import SHARD_SUFFIX
from coe_megatron.checkpoint.safe_unpickler import Disallowed, Unpickler
from coe_megatron.checkpoint.torch_file_check import MOST_DIMENSIONS, STORED_DTYPES
from coe_megatron.errors import ConfigError
from coe_megatron.files import read_limited
from coe_megatron.text import shortened

INDEX = ".metadata"
# A part takes some 200 bytes in the index, and 1,600 bytes besides its data in a file.
_MIN_INDEX, MAX_INDEX = 1 << 16, 1 << 26  # bytes
_MAX_KEY = 500  # characters


@dataclass(frozen=True)
class TensorIndex:
    """A folder's `.metadata`, not parsed yet, and the size of each data file."""

    path: str
    content: bytes
    sizes: dict[str, int]

    @classmethod
    def read(cls, folder: Path) -> "TensorIndex":
        """Read the index of a folder.

        Raises:
            ConfigError: it cannot be read, or is larger than data files of this size need.
        """
        try:
            sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.suffix == SHARD_SUFFIX}
        except OSError as error:
            raise ConfigError(f"{folder.name} cannot be read: {(error.strerror or str(error)).lower()}") from None
        path, most = f"{folder.name}/{INDEX}", min(MAX_INDEX, _MIN_INDEX + sum(sizes.values()) // 4)
        return cls(path, read_limited(folder / INDEX, path, most), sizes)

    def parse(self) -> Metadata:
        """The index that torch would unpickle.

        Raises:
            ConfigError: it is not an index, needs names that are not allowed, or does not match the files.
        """
        try:
            found = _Unpickler().load(self.content)
            if type(found) is not Metadata:
                raise ValueError("it has other contents")
            _require_parts(found, self.sizes)
        except Disallowed as error:
            raise ConfigError(f"{self.path} needs {shortened(str(error))}, which no tensor index needs") from error
        except ValueError as error:
            raise ConfigError(f"{self.path} is not a tensor index: {shortened(str(error))}") from error
        return found


def _require_parts(found: Metadata, sizes: Mapping[str, int]) -> None:
    parts = 0
    for key, entry in found.state_dict_metadata.items():
        if type(key) is not str or type(entry) is not TensorStorageMetadata:
            raise ValueError("it lists something other than tensors")
        if not key.isprintable() or len(key) > _MAX_KEY:
            raise ValueError("the name of a tensor is too long or not printable")
        if not covers(entry.chunks, entry.size):
            raise ValueError(f"the parts of {key} have gaps, overlap, or have another shape")
        for chunk in entry.chunks:
            _require_place(found.storage_data.get(MetadataIndex(key, chunk.offsets)), key, entry, chunk, sizes)
        parts += len(entry.chunks)
    if not parts or parts != len(found.storage_data):
        raise ValueError("it lists no tensors, or parts of unlisted ones")


def _require_place(
    place: Any, key: str, entry: TensorStorageMetadata, chunk: ChunkStorageMetadata, sizes: Mapping[str, int]
) -> None:
    """Check that a part is inside a file and large enough for its data."""
    if type(place) is not _StorageInfo:
        raise ValueError(f"a part of {key} has no location")
    if Path(place.relative_path).name != place.relative_path:
        raise Disallowed(f"the file {place.relative_path}")
    if place.relative_path not in sizes:
        raise ValueError(f"a part of {key} is in {place.relative_path}, which is missing")
    needed = math.prod(chunk.sizes) * entry.properties.dtype.itemsize
    if place.length < needed or not 0 <= place.offset <= sizes[place.relative_path] - place.length:
        raise ValueError(f"a part of {key} is in {place.relative_path}, which is too short for it")


def covers(chunks: Sequence[ChunkStorageMetadata], size: torch.Size, dimension: int = 0) -> bool:
    """Whether chunks cover a tensor without gap or overlap: split along the first dimension, each slab along the next.

    Megatron splits every tensor in this way.
    """
    if dimension == len(size):
        return len(chunks) == 1
    slabs: dict[tuple[int, int], list[ChunkStorageMetadata]] = {}
    for chunk in chunks:
        if len(chunk.offsets) != len(size) or len(chunk.sizes) != len(size):
            return False
        slabs.setdefault((chunk.offsets[dimension], chunk.sizes[dimension]), []).append(chunk)
    end = 0
    for (offset, length), slab in sorted(slabs.items(), key=lambda each: each[0]):
        if offset != end or not covers(slab, size, dimension + 1):
            return False
        end += length
    return end == size[dimension]


def _size(items: Any) -> torch.Size:
    if type(items) is not tuple or not all(type(item) is int and 0 <= item < 2**62 for item in items):
        raise ValueError("a size is invalid")
    if len(items) > MOST_DIMENSIONS:
        raise ValueError(f"a size has more than {MOST_DIMENSIONS} dimensions")
    return torch.Size(items)


def _layout(name: Any) -> torch.layout:
    if name != "torch.strided":
        raise ValueError("a tensor is not strided")
    return torch.strided


def _memory_format(number: Any) -> _MEM_FORMAT_ENCODING:
    if number != _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT.value:
        raise ValueError("a tensor is not contiguous")
    return _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT


# The types that each field of an instance may have.
_FIELDS: dict[type, dict[str, tuple[type, ...]]] = {
    Metadata: {
        "state_dict_metadata": (dict,), "storage_data": (dict,), "storage_meta": (StorageMeta, NoneType),
        "planner_data": (NoneType,), "version": (str, NoneType),
    },
    StorageMeta: {**dict.fromkeys(("checkpoint_id", "save_id", "load_id"), (NoneType, str)), "modules": (list,)},
    TensorStorageMetadata: {"properties": (TensorProperties,), "size": (torch.Size,), "chunks": (list,)},
    ChunkStorageMetadata: {"offsets": (torch.Size,), "sizes": (torch.Size,)},
    MetadataIndex: {"fqn": (str,), "offset": (torch.Size,), "index": (int, NoneType)},
    _StorageInfo: {
        "relative_path": (str,), "offset": (int,), "length": (int,), "transform_descriptors": (NoneType,),
    },
}  # fmt: skip
_PROPERTIES = (torch.dtype, torch.layout, bool, _MEM_FORMAT_ENCODING, bool)


class _Unpickler(Unpickler):
    names: ClassVar = {
        **{f"torch {str(dtype).removeprefix('torch.')}": dtype for dtype in STORED_DTYPES.values()},
        **{f"{known.__module__} {known.__name__}": known for known in (*_FIELDS, TensorProperties)},
        "torch Size": _size,
        f"{_get_layout.__module__} {_get_layout.__name__}": _layout,
        f"{_MEM_FORMAT_ENCODING.__module__} {_MEM_FORMAT_ENCODING.__name__}": _memory_format,
    }
    keys = (str, MetadataIndex)
    items = (ChunkStorageMetadata,)

    def build(self, made: Any, state: Any) -> None:
        if type(made) is TensorProperties:
            suits = type(state) is tuple and tuple(map(type, state)) == _PROPERTIES
        else:
            fields = _FIELDS[type(made)]
            suits = type(state) is dict and fields.keys() - state.keys() <= {"transform_descriptors"}
            suits = suits and all(type(value) in fields.get(name, ()) for name, value in state.items())
        if not suits:
            raise ValueError(f"a {type(made).__name__} has invalid fields")
        made.__setstate__(state) if type(made) is TensorProperties else vars(made).update(state)
