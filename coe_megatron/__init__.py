"""Chain-of-Experts for Megatron-Core: the method, its layer specs, and a training program.

Importing this package imports neither torch nor DeepSpeed nor Megatron-Core, and patches nothing. Import the parts you
need: `coe_megatron.chain` (the method), `coe_megatron.model` (specs for Megatron-Core), `coe_megatron.training` (the
program behind `launch/pretrain_coe.py`).
"""

__version__ = "0.1.0"
