"""DeepSpeed ZeRO as the optimizer of Megatron models. All code that depends on DeepSpeed is in this package.

Without CUDA, this package selects DeepSpeed's CPU accelerator before the import; otherwise DeepSpeed prints its choice
to stdout. So other packages do not import `deepspeed` themselves; its engine's type is
`coe_megatron.zero.engine.Engine`.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
