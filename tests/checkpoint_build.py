"""Small checkpoints without a model: for tests of what is refused in them."""

from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

from coe_megatron.checkpoint import storage
from coe_megatron.checkpoint.integrity import MANIFEST, write_manifest
from coe_megatron.checkpoint.metadata import METADATA, CheckpointMetadata, SavedLayout
from coe_megatron.checkpoint.names import name_of

ROWS, COLUMNS = 4, 2_000
WEIGHT = "decoder.weight"


def make_checkpoint(folder: Path, step: int) -> Path:
    """A whole one of a single rank, with a weight and its master in two parts each."""
    checkpoint = folder / name_of(step)
    for part in ("tensors", "random"):
        (checkpoint / part).mkdir(parents=True)
    chunks = [ChunkStorageMetadata(torch.Size([row, 0]), torch.Size([2, COLUMNS])) for row in (0, 2)]
    entries = {
        key: TensorStorageMetadata(TensorProperties(dtype), torch.Size([ROWS, COLUMNS]), chunks)
        for key, dtype in ((WEIGHT, torch.bfloat16), (storage.MASTER + WEIGHT, torch.float32))
    }
    storage.write(
        checkpoint / "tensors",
        entries,
        lambda key, chunk: torch.full(chunk.sizes, float(step), dtype=entries[key].properties.dtype),
    )
    torch.save({"cpu": torch.get_rng_state()}, checkpoint / "random" / "00000.pt")
    facts = CheckpointMetadata(SavedLayout(1, 1, 1, 1, 1, 1), 1, {"step": step, "tokens": 10 * step, "tokenizer": "T"})
    (checkpoint / METADATA).write_text(facts.as_json())
    write_manifest(checkpoint)
    return checkpoint


def rewrite_manifest(checkpoint: Path) -> None:
    """Vouch for whatever is there now."""
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint)
