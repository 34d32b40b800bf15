"""What plugs into Megatron-Core: spec functions, the CoE layer and its parts."""

from coe_megatron.model.layer import CoELayer
from coe_megatron.model.specs import coe_block_spec, coe_layer_spec

__all__ = ["CoELayer", "coe_block_spec", "coe_layer_spec"]
