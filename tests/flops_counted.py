"""torch's FLOP counter, told of the kernels of this project that it does not know."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from coe_megatron.estimate.closed_forms import ModelShape


def counting(shape: ModelShape) -> FlopCounterMode:
    """Counts what is computed in its `with` block by a model of this shape."""
    kernels = {
        torch.ops.aten._grouped_mm: _grouped_product,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_of(shape),
    }
    return FlopCounterMode(display=False, custom_mapping=kernels)


def _grouped_product(rows: Any, weights: Any, *_args: Any, **_more: Any) -> int:
    """Of grouped_mm: each row meets one expert's matrix, or (for the weights' gradients) two lists of rows meet."""
    return 2 * rows[0] * rows[1] * weights[-1]


def _attention_of(shape: ModelShape) -> Any:
    """Of the CPU's attention kernel, without the zeros that short values are filled up with."""

    def count(query: Any, key: Any, value: Any, *_args: Any, **_more: Any) -> int:
        width = shape.v_head_dim if shape.attention == "mla" else value[3]
        return 2 * query[0] * query[1] * query[2] * key[2] * (query[3] + width)

    return count
