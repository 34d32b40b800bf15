"""Lets Megatron-Core run without Transformer Engine, on any device. Programs call `install()`; importing does nothing.

What is replaced, and why (Megatron-Core 0.16.1):

* `moe_utils.te_general_gemm`: the router's linear layer tests the name for None, but without Transformer Engine the
  name is never defined, so the first forward pass dies of a NameError. It becomes None: torch's matmul is used.
* `multi_latent_attention.HAVE_TE`: true although Transformer Engine is missing (its import there succeeds with
  placeholder classes), so `isinstance(..., TELinear)` dies of a TypeError. It becomes False.
"""

from importlib.util import find_spec


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed (it is not imported to find out)."""
    return find_spec("transformer_engine") is not None


def install() -> None:
    """Apply the replacements where Transformer Engine is missing; does nothing where it is installed."""
    if has_transformer_engine():
        return
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None
    multi_latent_attention.HAVE_TE = False
