"""Chain-of-Experts for Megatron-Core: the method, its layer specs, and what trains them.

Importing this package loads neither torch.distributed engines nor DeepSpeed nor Megatron-Core, and patches
nothing. Take what you need from its parts: `coe_megatron.chain` (the method), `coe_megatron.model` (specs for
Megatron-Core), `coe_megatron.training` (the program behind `launch/pretrain_coe.py`).
"""

__version__ = "0.1.0"
