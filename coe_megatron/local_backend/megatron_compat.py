"""Differences between the releases of Megatron-Core that are supported, and their use without Transformer Engine.

Python 3.11 has Megatron-Core 0.16.1, Python 3.12 and newer 0.19.2. Only this module asks for the release; each function
says what differs. Programs call `install()`; importing does nothing. docs/megatron-releases.md has a table.
"""

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

_OLD = tuple(int(part) for part in version("megatron-core").split(".")[:2]) < (0, 17)


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed (without importing it)."""
    return find_spec("transformer_engine") is not None


def install() -> None:
    """Make 0.16.1 work without Transformer Engine, and both releases with it but without CUDA.

    * `moe_utils.te_general_gemm`: the router's linear layer calls it, also in local specs, unless it is None. Without
      Transformer Engine it is undefined in 0.16.1, which raises a NameError; with it, it refuses tensors of the CPU. It
      becomes None: torch's matmul is used.
    * `multi_latent_attention.HAVE_TE` is True in 0.16.1 although Transformer Engine is missing, since its import there
      succeeds with placeholder classes; `isinstance(..., TELinear)` then raises a TypeError. It becomes False.
    """
    missing = _OLD and not has_transformer_engine()
    if missing or (has_transformer_engine() and not torch.cuda.is_available()):
        from megatron.core.transformer.moe import moe_utils

        moe_utils.te_general_gemm = None
    if missing:
        from megatron.core.transformer import multi_latent_attention

        multi_latent_attention.HAVE_TE = False


def moe_submodules(mlp: Any) -> Any:
    """The MoESubmodules of a layer spec's `mlp`; None if that is a dense MLP.

    A MoE layer in a spec is a ModuleSpec in 0.16.1, a `functools.partial` in 0.19.2.
    """
    from megatron.core.transformer.moe.moe_layer import MoELayer

    layer = mlp.module if _OLD else getattr(mlp, "func", None)
    if layer is not MoELayer:
        return None
    return mlp.submodules if _OLD else mlp.keywords["submodules"]


def moe_layer_spec(layer: type, submodules: Any, pg_collection: Any, **arguments: Any) -> Any:
    """What builds a MoE layer in a layer spec.

    0.16.1 passes process groups only to layer classes that it knows by name, so `pg_collection` goes into the spec;
    0.19.2 passes those of the model to every layer.
    """
    if not _OLD:
        return partial(layer, submodules=submodules, **arguments)
    from megatron.core.transformer.spec_utils import ModuleSpec

    if pg_collection is not None:
        arguments["pg_collection"] = pg_collection
    return ModuleSpec(module=layer, submodules=submodules, params=arguments)


def experts_spec(experts: type, **arguments: Any) -> Any:
    """What builds the experts in MoESubmodules: a ModuleSpec in 0.16.1, a `functools.partial` in 0.19.2."""
    if not _OLD:
        return partial(experts, **arguments)
    from megatron.core.transformer.spec_utils import ModuleSpec

    return ModuleSpec(module=experts, params=arguments)


def track_loss(name: str, loss: torch.Tensor, layer_number: int, num_layers: int, **reduction: Any) -> None:
    """Add to Megatron's tracker of auxiliary losses, which 0.19.2 has made a class.

    Args:
        reduction: as the router's `attach_and_log_load_balancing_loss` receives it: `reduce_group`, and
            `reduce_group_has_dp` in 0.16.1 or its negation `needs_dp_avg` in 0.19.2.
    """
    _tracker()(name, loss, layer_number, num_layers, **reduction)


def _tracker() -> Callable:
    if _OLD:
        from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker

        return save_to_aux_losses_tracker
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    return get_moe_metrics_tracker().record


def per_token_ranks(tp_cp_group: torch.distributed.ProcessGroup) -> int:
    """Factor of the number of a rank's tokens in auxiliary losses under `calculate_per_token_loss`.

    0.19.2 multiplies by the ranks that have parts of the same sequences, which makes the loss independent of tensor
    parallelism; 0.16.1 does not.
    """
    return 1 if _OLD else tp_cp_group.size()


def build_moe_layer(spec: Any, config: Any, pg_collection: Any) -> Any:
    """Build the MoE layer of a layer spec's `mlp`, as Megatron's transformer layer does."""
    if not _OLD:
        return spec(config=config, pg_collection=pg_collection, is_mtp_layer=False)
    from megatron.core.transformer.spec_utils import build_module

    return build_module(spec, config=config, pg_collection=pg_collection)
