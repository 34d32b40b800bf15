"""How much a checkpoint takes on the disk, without torch; tests hold it against checkpoints that were saved."""

from coe_megatron.config.layout import Layout
from coe_megatron.estimate import closed_forms
from coe_megatron.estimate.closed_forms import ModelShape
from coe_megatron.estimate.run_shape import RunShape

_KINDS = 4  # a weight, its fp32 master and AdamW's two moments
_MASTER_AND_MOMENTS = 12  # bytes a parameter
# Measured: torch writes each part of a tensor as a file of its own within a file, and lists it in `.metadata`.
_BYTES_A_PART = 1_750
_BYTES_A_RANK = 23_000  # the states of its generators, on the CPU


def checkpoint_bytes(run: RunShape) -> int:
    """Bytes of one checkpoint."""
    of_tensors = (run.element_bytes + _MASTER_AND_MOMENTS) * closed_forms.parameters(run.model).total
    return of_tensors + _KINDS * _parts(run.model, run.layout) * _BYTES_A_PART + run.layout.world_size * _BYTES_A_RANK


def _parts(shape: ModelShape, ranks: Layout) -> int:
    """In how many parts weights are stored: experts one by one, the halves of SwiGLU apart, each as it is cut.

    Norms are counted as four a layer: the parts of experts are what weighs.
    """
    attention = len(("qkv", "output")) if shape.attention == "mha" else 4
    experts = shape.experts * shape.ffn_matrices * ranks.expert_tensor
    shared = shape.ffn_matrices * ranks.tensor * bool(shape.shared_ffn)
    dense = (shape.layers - shape.num_moe_layers) * shape.ffn_matrices * ranks.tensor
    moe = sum(count * (experts + shared + kind.routers + kind.gains) for count, kind in shape.moe_kinds)
    return moe + dense + shape.layers * (attention * ranks.tensor + 4) + 2 * ranks.tensor
