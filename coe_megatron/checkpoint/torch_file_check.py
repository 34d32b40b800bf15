"""What `torch.save` wrote, looked into before torch reads it.

`torch.load(weights_only=True)` runs no code, but inflates what is compressed, makes a `bytearray` of any length, and
makes a tensor as large as the file says. Here nothing is read but the list of what is in the file.
"""

import io
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

import torch

from coe_megatron.checkpoint.safe_unpickler import Refused, Unpickler

_MOST_AT_ONCE = 1 << 16  # bytes; the pickle of a tensor takes 160, that of a rank's generators 500
_CUDA_STATE = 16  # bytes
_NONE = "it is no file of torch's"
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
    """Type and shape of a tensor whose bytes are all there."""

    dtype: torch.dtype
    sizes: torch.Size


def look_into(file: IO[bytes], size: int, start: int = 0) -> Any:
    """Tensors, or dicts of them by name, each as a `SavedTensor`.

    Args:
        file: from `start` on so many bytes of it (`size`) are what `torch.save` wrote.

    Raises:
        ValueError: it is no file of torch's, holds more than tensors, or less than it says.
    """
    try:
        with zipfile.ZipFile(_Window(file, start, size)) as archive:
            _require_plain(archive, size)
            pickled = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickled) != 1:
                raise ValueError(_NONE)
            folder = pickled[0].removesuffix("data.pkl")
            if archive.read(f"{folder}byteorder") != b"little":
                raise ValueError("its numbers are not little-endian")
            return _Saved(archive, folder).load(archive.read(pickled[0]))
    except Refused as error:
        raise ValueError(f"it asks for {str(error)[:100]}, of which no tensor is made") from error
    except (zipfile.BadZipFile, NotImplementedError, EOFError, KeyError) as error:  # also a kind of zip not known
        raise ValueError(_NONE) from error


def saved_problem(path: Path, is_right: Callable[[Any], bool]) -> str | None:
    """Why a file is none of torch's with the right things in it (as `look_into` returns them), None if it is."""
    try:
        with path.open("rb") as file:
            found = look_into(file, path.stat().st_size)
        if not is_right(found):
            raise ValueError("it holds something else")
    except (OSError, ValueError) as error:
        return f"{path.parent.name}/{path.name} is damaged: {error}"
    return None


def generators_problem(path: Path) -> str | None:
    """The same for the states of a rank's generators, by name."""
    kinds = [SavedTensor(torch.uint8, size) for size in (torch.get_rng_state().size(), torch.Size([_CUDA_STATE]))]

    def are_states(found: Any) -> bool:
        return type(found) is dict and "cpu" in found and all(state in kinds for state in found.values())

    return saved_problem(path, are_states)


class _Window:
    """Some bytes of a file as a file, never more of them at once than a list of tensors needs, whatever it claims."""

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
        if count > _MOST_AT_ONCE:
            raise ValueError(f"it has more than {_MOST_AT_ONCE:,} bytes beside its numbers")
        self._file.seek(self._start + self._at)
        self._at += count
        return self._file.read(count)


def _require_plain(archive: zipfile.ZipFile, size: int) -> None:
    """Nothing compressed, encrypted or twice there (torch's reader tells no capital letters), nothing around it."""
    entries = archive.infolist()
    alone = not archive.comment and min((entry.header_offset for entry in entries), default=1) == 0
    if not alone or len({entry.filename.lower() for entry in entries}) != len(entries):
        raise ValueError(_NONE)
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise ValueError("it is compressed or encrypted")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("it claims more bytes than it has")


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    count: int


def _tensor(storage: Any, offset: Any, sizes: Any, strides: Any, *_: Any) -> SavedTensor:
    """For torch's `_rebuild_tensor_v2`."""
    numbers = (offset, *sizes, *strides)
    if type(storage) is not _Storage or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a tensor in it is none")
    if len(sizes) != len(strides) or len(sizes) > MOST_DIMENSIONS:
        raise ValueError("a tensor in it has a shape that is none")
    last = offset + sum((length - 1) * stride for length, stride in zip(sizes, strides, strict=True))
    if math.prod(sizes) and last >= storage.count:
        raise ValueError("a tensor in it claims more bytes than there are")
    return SavedTensor(storage.dtype, torch.Size(sizes))


def _no_hooks(*items: Any) -> None:
    """For the ordered dict of a tensor's hooks, which is empty."""
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
        """Bytes that lie in a file of their own in the archive."""
        kind, dtype, name, _location, count = identity
        if kind != "storage" or type(dtype) is not torch.dtype or type(name) is not str or type(count) is not int:
            raise ValueError("a tensor in it is none")
        if self._archive.getinfo(f"{self._folder}data/{name}").file_size != count * dtype.itemsize:
            raise ValueError("a tensor in it has another size than its bytes")
        return _Storage(dtype, count)
