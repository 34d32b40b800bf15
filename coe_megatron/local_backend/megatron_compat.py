"""Lets Megatron-Core run without Transformer Engine, on any device. Programs call `install()`; importing does nothing.

Replacements and reasons (Megatron-Core 0.16.1):

* `moe_utils.te_general_gemm`: the router's linear layer tests the name for None, but without Transformer Engine the
  name is never defined, so the first forward pass raises a NameError. It becomes None, so torch's matmul is used.
* `multi_latent_attention.HAVE_TE`: true although Transformer Engine is missing (its import there succeeds with
  placeholder classes), so `isinstance(..., TELinear)` raises a TypeError. It becomes False.
"""

from importlib.util import find_spec


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed (without importing it)."""
    return find_spec("transformer_engine") is not None


def install() -> None:
    """Apply the replacements if Transformer Engine is missing; otherwise do nothing."""
    if has_transformer_engine():
        return
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None
    multi_latent_attention.HAVE_TE = False
