"""The files that a run of many ranks makes and opens, by count: checkpoints, start-up, resume."""

import pickle
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from coe_megatron.checkpoint.integrity import MAX_MANIFEST_BYTES, manifest_text
from coe_megatron.checkpoint.tensor_index import MAX_INDEX
from coe_megatron.config.settings import DataSettings
from coe_megatron.data.folders import training_parts, validation_paths
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.checkpoint_size import RNG_BYTES, checkpoint_bytes
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.scale.rehearsal.shards import RankShards
from coe_megatron.zero import optimizer_states

_SMALL = {"tensors/common.pt": 1_260, "tensors/metadata.json": 120, "state.json": 560}  # about
_KINDS = ("", *(f"optimizer.{kind}." for kind in optimizer_states.KINDS))  # of a parameter's tensors
_OPENS = {"row": (7, 4), "packed": (13, 13)}  # of a training and a validation split's files, by one rank


@dataclass(frozen=True)
class CheckpointPlan:
    """The files of one checkpoint.

    Attributes:
        files: number of files, by folder and kind.
        sizes: bytes of one of them, about, by folder and kind.
    """

    files: dict[str, int]
    sizes: dict[str, int]

    @classmethod
    def of(cls, run: RunShape, shards: Iterable[RankShards]) -> "CheckpointPlan":
        """Every rank writes a file of tensors, an empty one too, and one of RNG states; rank 0 writes the others."""
        ranks = run.layout.world_size
        small = {**_SMALL, "tensors/.metadata": index_bytes(shards), "complete.json": manifest_bytes(ranks)}
        tensors = (checkpoint_bytes(run) - ranks * RNG_BYTES - small["tensors/.metadata"]) // ranks
        files = {"tensors/__R_0.distcp": ranks, "random/R.pt": ranks, **dict.fromkeys(small, 1)}
        return cls(files, {"tensors/__R_0.distcp": tensors, "random/R.pt": RNG_BYTES, **small})

    @property
    def total_files(self) -> int:
        """All files."""
        return sum(self.files.values())

    @property
    def total_bytes(self) -> int:
        """All bytes."""
        return sum(count * self.sizes[name] for name, count in self.files.items())

    def check(self) -> None:
        """Check that a later start will read these files.

        Raises:
            ConfigError: one is larger than what is read of such a file.
        """
        for name, most in (("complete.json", MAX_MANIFEST_BYTES), ("tensors/.metadata", MAX_INDEX)):
            if self.sizes[name] > most:
                raise ConfigError(
                    f"checkpoint: {name} would have {self.sizes[name]:,} bytes, but at most {most:,} are read of it"
                )


def manifest_bytes(ranks: int) -> int:
    """Bytes of `complete.json` of so many ranks."""
    entry = {"bytes": 10**11, "sha256": 64 * "0"}
    names = [name for rank in range(ranks) for name in (f"tensors/__{rank}_0.distcp", f"random/{rank:05d}.pt")]
    others = (*_SMALL, "tensors/.metadata")
    return len(manifest_text(dict.fromkeys([*names, *others], entry)))


def index_bytes(shards: Iterable[RankShards]) -> int:
    """Bytes of `tensors/.metadata` with the parts of all ranks, of each kind of tensor."""
    chunks: dict[str, list[ChunkStorageMetadata]] = defaultdict(list)
    sizes: dict[str, torch.Size] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for rank, shard in enumerate(shards):
        file = f"__{rank}_0.distcp"
        for key, size, offset, length in shard.main:
            for name in (kind + key for kind in _KINDS):
                sizes[name] = torch.Size(size)
                chunks[name].append(ChunkStorageMetadata(torch.Size(offset), torch.Size(length)))
                place = _StorageInfo(file, 2**33 + len(places), 2**20)
                places[MetadataIndex(name, torch.Size(offset))] = place
    own = TensorProperties(torch.float32)
    return len(
        pickle.dumps(Metadata({name: TensorStorageMetadata(own, sizes[name], chunks[name]) for name in sizes}, places))
    )


@dataclass(frozen=True)
class Resume:
    """What all ranks together do to read a checkpoint.

    Attributes:
        checked: how often files are opened to compare checksums and parts, each by one rank.
        opened: how often files are opened to read tensors, at most.
        read: bytes of these tensors; each replica reads all that it holds.
    """

    checked: int
    opened: int
    read: int

    @classmethod
    def of(cls, run: RunShape, shards: list[RankShards], plan: CheckpointPlan) -> "Resume":
        """A rank opens each file with some of its parts, once for each kind of tensor. Before, one rank looks into each
        part, and one hashes each file.
        """
        replicas, ranks = run.layout.world_size // len(shards), run.layout.world_size
        opened = sum(len(_KINDS) * min(shard.parts, ranks) for shard in shards) * replicas
        width = run.element_bytes + 4 * (len(_KINDS) - 1)
        parts = len(_KINDS) * sum(len(shard.main) for shard in shards)
        return cls(plan.total_files - 1 + parts, opened, sum(shard.parameters for shard in shards) * width * replicas)


def data_opens(data: DataSettings) -> int:
    """How often a rank opens files of its data: indices, tokens and, of packed samples, the order of their windows."""
    training, validation = _OPENS[data.samples]
    return len(training_parts(data)) * training + len(validation_paths(data)) * validation


def order_bytes(run: RunShape) -> int:
    """Host memory in which each rank keeps the corpus of each sample up to the last step, at most."""
    return 4 * run.config.training.steps * run.config.training.global_batch  # int16, up to twice as many as needed


def exchanged_before_save(run: RunShape, shards: Iterable[RankShards]) -> tuple[int, int]:
    """What a rank receives before a save, from all ranks: descriptions of their parts, and bytes of these.

    Megatron exchanges them among the replicas, to divide the writing, and then among all ranks, to check the result.
    """
    largest = max(shards, key=lambda shard: shard.described)
    rounds = len(_KINDS) * (run.layout.replicas + run.layout.world_size)
    return largest.parts * rounds, largest.described * rounds
