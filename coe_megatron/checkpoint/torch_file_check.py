"""Checks files written by `torch.save` before torch reads them.

`torch.load(weights_only=True)` runs no code, but it inflates compressed data, allocates a `bytearray` of any length,
and allocates a tensor as large as the file claims. This module reads only the description of the tensors.
"""

import io
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

import torch

from coe_megatron.checkpoint.safe_unpickler import Disallowed, Unpickler
from coe_megatron.text import shortened

_MAX_READ = 1 << 16  # bytes; the pickle of a tensor takes 160, that of a rank's RNG states 500
_CUDA_STATE = 16  # bytes
_INVALID = "it was not written by torch.save"
MOST_DIMENSIONS = 16
STORED_DTYPES: dict[str, torch.dtype] = {
    "torch FloatStorage": torch.float32,
    "torch BFloat16Storage": torch.bfloat16,
    "torch HalfStorage": torch.float16,
    "torch DoubleStorage": torch.float64,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class SavedTensor:
    """Dtype and shape of a tensor whose data is complete."""

    dtype: torch.dtype
    sizes: torch.Size


def inspect_saved(file: IO[bytes], size: int, start: int = 0) -> Any:
    """Describe a saved tensor, or dict of tensors by name, each as a `SavedTensor`.

    Args:
        file: `torch.save` wrote its `size` bytes from `start` on.

    Raises:
        ValueError: it was not written by `torch.save`, holds more than tensors, or less data than it claims.
    """
    try:
        with zipfile.ZipFile(_Window(file, start, size)) as archive:
            _require_plain(archive, size)
            pickled = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickled) != 1:
                raise ValueError(_INVALID)
            folder = pickled[0].removesuffix("data.pkl")
            if archive.read(f"{folder}byteorder") != b"little":
                raise ValueError("its numbers are not little-endian")
            return _Saved(archive, folder).load(archive.read(pickled[0]))
    except Disallowed as error:
        raise ValueError(f"it needs {shortened(str(error), 100)}, which no tensor needs") from error
    except (zipfile.BadZipFile, NotImplementedError, EOFError, KeyError) as error:  # the second: an unknown kind of zip
        raise ValueError(_INVALID) from error


def saved_problem(path: Path, is_right: Callable[[Any], bool]) -> str | None:
    """What is wrong with a file of `torch.save`; None if `is_right` accepts what `inspect_saved` returns for it."""
    try:
        with path.open("rb") as file:
            found = inspect_saved(file, path.stat().st_size)
        if not is_right(found):
            raise ValueError("it has other contents")
    except (OSError, ValueError) as error:
        return f"{path.parent.name}/{path.name} is damaged: {error}"
    return None


def rng_states_problem(path: Path) -> str | None:
    """What is wrong with a file of a rank's RNG states, by name; None if nothing is."""
    kinds = [SavedTensor(torch.uint8, size) for size in (torch.get_rng_state().size(), torch.Size([_CUDA_STATE]))]

    def are_states(found: Any) -> bool:
        return type(found) is dict and "cpu" in found and all(state in kinds for state in found.values())

    return saved_problem(path, are_states)


class _Window:
    """A byte range of a file as a file object that limits the size of a single read."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        count = left if count < 0 else min(count, left)
        if count > _MAX_READ:
            raise ValueError(f"it has more than {_MAX_READ:,} bytes besides tensor data")
        self._file.seek(self._start + self._at)
        self._at += count
        return self._file.read(count)


def _require_plain(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse compressed, encrypted and duplicate entries (torch's reader ignores case), and data around the archive."""
    entries = archive.infolist()
    nothing_around = not archive.comment and min((entry.header_offset for entry in entries), default=1) == 0
    if not nothing_around or len({entry.filename.lower() for entry in entries}) != len(entries):
        raise ValueError(_INVALID)
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise ValueError("it is compressed or encrypted")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("it claims more bytes than it has")


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    count: int


def _tensor(storage: Any, offset: Any, sizes: Any, strides: Any, *_: Any) -> SavedTensor:
    """Stands in for torch's `_rebuild_tensor_v2`."""
    numbers = (offset, *sizes, *strides)
    if type(storage) is not _Storage or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a tensor in it is invalid")
    if len(sizes) != len(strides) or len(sizes) > MOST_DIMENSIONS:
        raise ValueError("a tensor in it has an invalid shape")
    last = offset + sum((length - 1) * stride for length, stride in zip(sizes, strides, strict=True))
    if math.prod(sizes) and last >= storage.count:
        raise ValueError("a tensor in it claims more data than there is")
    return SavedTensor(storage.dtype, torch.Size(sizes))


def _no_hooks(*items: Any) -> None:
    """Stands in for the OrderedDict of a tensor's hooks, which must be empty."""
    if items:
        raise ValueError("a tensor in it has hooks")


class _Saved(Unpickler):
    names: ClassVar = {
        **STORED_DTYPES,
        "torch._utils _rebuild_tensor_v2": _tensor,
        "collections OrderedDict": _no_hooks,
    }

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__()
        self._archive, self._folder = archive, folder

    def persistent_load(self, identity: Any) -> _Storage:
        """The storage of a tensor, a separate file in the archive."""
        kind, dtype, name, _location, count = identity
        if kind != "storage" or type(dtype) is not torch.dtype or type(name) is not str or type(count) is not int:
            raise ValueError("a tensor in it is invalid")
        if self._archive.getinfo(f"{self._folder}data/{name}").file_size != count * dtype.itemsize:
            raise ValueError("the size of a tensor in it does not match its data")
        return _Storage(dtype, count)
