"""Predicted size of a checkpoint on disk; tests compare it with saved checkpoints. Does not import torch."""

from coe_megatron.config.layout import Layout
from coe_megatron.estimate import closed_forms
from coe_megatron.estimate.closed_forms import ModelShape
from coe_megatron.estimate.run_shape import RunShape

_KINDS = 4  # a weight, its fp32 master and AdamW's two moments
MASTER_AND_MOMENTS = 12  # bytes per parameter: fp32 master weight and AdamW's two moments
# Measured: torch writes each part of a tensor as a separate archive within a file, and lists it in `.metadata`.
_BYTES_PER_PART = 1_750
RNG_BYTES = 23_000  # of a rank's RNG states on the CPU


def checkpoint_bytes(run: RunShape) -> int:
    """Bytes of one checkpoint."""
    tensor_bytes = (run.element_bytes + MASTER_AND_MOMENTS) * closed_forms.parameters(run.model).total
    part_bytes = _KINDS * _parts(run.model, run.layout) * _BYTES_PER_PART
    return tensor_bytes + part_bytes + run.layout.world_size * RNG_BYTES


def _parts(shape: ModelShape, layout: Layout) -> int:
    """Number of stored parts of the weights: each expert, each half of SwiGLU, and each shard is a part.

    Norms count as four per layer; experts have by far the most parts.
    """
    attention = len(("qkv", "output")) + shape.qkv_bias if shape.attention == "mha" else 4
    experts = shape.experts * shape.ffn_matrices * layout.expert_tensor
    shared = shape.ffn_matrices * layout.tensor * bool(shape.shared_ffn) + shape.shared_gate
    dense = (shape.layers - shape.num_moe_layers) * shape.ffn_matrices * layout.tensor
    moe = sum(count * (experts + shared + kind.routers + _variant_tensors(kind)) for count, kind in shape.moe_kinds)
    return moe + dense + shape.layers * (attention * layout.tensor + 4) + 2 * layout.tensor


def _variant_tensors(shape: ModelShape) -> int:
    """Tensors of a chain's variants."""
    matrices = len(shape.modulation_matrices) + len(shape.latent_matrices)
    return shape.gains + matrices + shape.chain.iterations * (shape.chain.streams is not None)
