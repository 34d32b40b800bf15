"""DeepSpeed ZeRO as the optimizer of Megatron models. All that this project knows of DeepSpeed stands in this package.

Without CUDA DeepSpeed is told at once that it runs on the CPU: left to find out, it says so on stdout on import. So the
other packages do not import `deepspeed` themselves; its engine's type is `coe_megatron.zero.engine.Engine`.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
