"""Tensors of a checkpoint, or of memory, by layer and expert, read one by one; no model, group or GPU is needed."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from coe_megatron.checkpoint.storage import MASTER, Reader

_LAYERS = "decoder.layers."


@dataclass(frozen=True)
class Place:
    """Where a tensor is in a checkpoint.

    Attributes:
        key: of the stored tensor.
        index: of the layer, and of the expert, along its first axes.
    """

    key: str
    index: tuple[int, ...] = ()


class Weights:
    """Reads the weights of a checkpoint.

    Args:
        folder: of the checkpoint.
        masters: whether fp32 masters are read where there are any, not the weights that training computes with.
    """

    def __init__(self, folder: Path, masters: bool = False) -> None:
        self._reader = Reader(folder / "tensors")
        self._masters = masters

    def place(self, name: str, layer: int | None = None, expert: int | None = None) -> Place:
        """Where a tensor of the model, of a layer (from 0), or of an expert of a layer is."""
        experts = () if expert is None else (expert,)
        if layer is None:
            return Place(name, experts)
        own = f"{_LAYERS}{layer}.{name}"
        return Place(own, experts) if self._has(own) else Place(_LAYERS + name, (layer, *experts))

    def shape(self, place: Place) -> torch.Size:
        """Shape of a tensor.

        Raises:
            KeyError: the checkpoint does not have it.
        """
        return self._reader.entries[place.key].size[len(place.index) :]

    def dtype(self, place: Place) -> torch.dtype:
        """dtype of a tensor as `read` gives it."""
        return self._reader.entries[self._key(place)].properties.dtype

    def read(self, place: Place) -> Tensor:
        """A tensor."""
        shape = self.shape(place)
        chunk = ChunkStorageMetadata(
            torch.Size((*place.index, *(0 for _ in shape))), torch.Size((*(1 for _ in place.index), *shape))
        )
        return self._reader.part(self._key(place), chunk).view(shape)

    def _has(self, key: str) -> bool:
        return key in self._reader.entries

    def _key(self, place: Place) -> str:
        master = MASTER + place.key
        return master if self._masters and master in self._reader.entries else place.key


class MemoryWeights(Weights):
    """The same of tensors in memory.

    Args:
        tensors: complete, under the keys that a checkpoint has for them.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def shape(self, place: Place) -> torch.Size:
        return self.tensors[place.key][place.index].shape

    def dtype(self, place: Place) -> torch.dtype:
        return self.tensors[place.key].dtype

    def read(self, place: Place) -> Tensor:
        return self.tensors[place.key][place.index].clone()

    def _has(self, key: str) -> bool:
        return key in self.tensors
