"""Mistakes, one for what a label stands for, that the comparison with one process must notice."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state

from coe_megatron.config.settings import MoESettings
from coe_megatron.local_backend import attention, latent_attention
from coe_megatron.model import build, layer, router, router_losses, router_state
from coe_megatron.model.exchange import Exchange
from coe_megatron.model.router import CoERouter
from coe_megatron.training import evaluation
from coe_megatron.zero import engine as zero_engine
from coe_megatron.zero import expert_groups, grad_clip, train_step

Patch = AbstractContextManager[Any]


def no_sums_over_sequence_parts() -> Patch:
    """Gradients of what tensor-parallel ranks share are not summed over their parts of the sequence."""
    return mock.patch.object(zero_engine, "_reduce_sequence_parallel_gradients", lambda model: None)


def keys_of_own_heads() -> Patch:
    """The gradient of the key that all heads share has what the heads of this rank add alone, as in Megatron."""
    return mock.patch.object(latent_attention, "_by_rows", lambda projection, rows, output: output)


def keys_out_of_order() -> Patch:
    """Keys and values stay in the order of the ranks that have them."""
    return mock.patch.object(attention, "in_order", lambda parts, ranks: parts)


def halved_by_parts() -> Patch:
    """The auxiliary losses are divided by the ranks that have parts of a sequence."""
    right = zero_engine.MoEAuxLossAutoScaler.set_loss_scale
    return mock.patch.object(zero_engine.MoEAuxLossAutoScaler, "set_loss_scale", lambda scale: right(scale / 2))


def across_documents() -> Patch:
    """Attention ignores where documents end."""
    right = attention.SDPACoreAttention._attend
    return mock.patch.object(
        attention.SDPACoreAttention,
        "_attend",
        lambda self, query, key, value, mask, causal, dropout: right(self, query, key, value, None, True, dropout),
    )


def experts_as_dense() -> Patch:
    """The gradients of different experts are averaged, as DeepSpeed does when it does not know them."""

    @contextmanager
    def forgotten(model: torch.nn.Module) -> Iterator[None]:
        for parameter in model.parameters():
            parameter.allreduce = True  # type: ignore[attr-defined]
        yield

    return mock.patch.object(expert_groups, "expert_placeholder", forgotten)


def norm_of_a_stage() -> Patch:
    """Each pipeline stage clips by the norm of its own gradients."""
    whole, tensor = grad_clip.norm_of_partitions, parallel_state.get_tensor_model_parallel_group

    def of_a_stage(optimizer: Any) -> torch.Tensor:
        with mock.patch.object(parallel_state, "get_model_parallel_group", tensor):
            return whole(optimizer)

    return mock.patch.object(grad_clip, "norm_of_partitions", of_a_stage)


def unweighted() -> Patch:
    """The losses of routers are means over micro-batches after all."""
    never = property(lambda self: None, lambda self, tokens: None)
    return mock.patch.object(router_losses.RouterWithLosses, "step_tokens", never)


def messages_mixed() -> Patch:
    """Messages to the next stage and to the previous one go as one batch, which two stages cannot tell apart."""
    right = build._layout_fields
    batched = {"overlap_p2p_comm": False, "batch_p2p_comm": True}
    return mock.patch.object(build, "_layout_fields", lambda config: right(config) | batched)


def norm_of_experts_alone() -> Patch:
    """What clips is the norm of the experts, which are those of some stages."""
    right = grad_clip.norm_with_experts
    return mock.patch.object(grad_clip, "norm_with_experts", lambda dense, **more: right(dense * 0, **more))


def loss_divided_by(count: Callable[[zero_engine.Engine], int]) -> Patch:
    """A division is not undone, so that a step is the mean over its replicas or micro-batches, not the sum."""
    right = train_step.backward
    return mock.patch.object(train_step, "backward", lambda engine, loss: right(engine, loss / count(engine)))


def without_z_loss() -> Patch:
    """Routers attach no z-loss."""
    return mock.patch.object(
        router_losses.RouterWithLosses, "apply_z_loss", lambda self, logits, padding_mask=None: logits
    )


def fading_with_replicas() -> Patch:
    """The losses of routers are scaled as Megatron's are: the global one is divided by the replicas."""
    always = property(lambda self: True, lambda self, given: None)
    return mock.patch.object(router_losses.RouterWithLosses, "megatron_losses", always, create=True)


def balanced_twice() -> Patch:
    """The coefficient of the balancing loss is doubled."""
    right = build._moe_fields

    def doubled(moe: MoESettings) -> dict[str, Any]:
        return right(replace(moe, aux_loss_coeff=2 * moe.aux_loss_coeff))

    return mock.patch.object(build, "_moe_fields", doubled)


def bias_without_updates() -> Patch:
    """The expert bias stays as it was."""
    return mock.patch.object(router_state, "_update_expert_bias", lambda biased: None)


def padding_as_tokens() -> Patch:
    """Routers take padding for tokens."""
    right = evaluation.forward

    def unaware(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return right(model, batch | {"padding_mask": torch.zeros_like(batch["padding_mask"])})

    return mock.patch.object(evaluation, "forward", unaware)


def other_experts_again() -> Patch:
    """What is computed again goes to the neighbours of the experts that were chosen."""
    right = CoERouter.forward

    def neighbours(self: CoERouter, states: torch.Tensor, mask: Any, record: Any, *others: Any) -> Any:
        if record is not None and record.is_known:
            record.experts_TK = (record.experts_TK + 1) % self.config.num_moe_experts
        return right(self, states, mask, record, *others)

    return mock.patch.object(CoERouter, "forward", neighbours)


def lost_rows() -> Patch:
    """Of what the experts return the first token's is lost."""
    right = Exchange.arrive

    def without_first(self: Exchange, *given: Any) -> torch.Tensor:
        found = right(self, *given)
        return found * (torch.arange(len(found)) > 0)[:, None]

    return mock.patch.object(Exchange, "arrive", without_first)


def chunks_in_wrong_order() -> Patch:
    """What comes out of the chunks is joined in the wrong order."""
    right = layer.CoELayer._chunks
    return mock.patch.object(layer.CoELayer, "_chunks", lambda *given: right(*given)[::-1])


def another_capacity() -> Patch:
    """Experts take twice as many rows."""
    right = router.within_capacity
    return mock.patch.object(
        router, "within_capacity", lambda *given, factor, **more: right(*given, factor=2 * factor, **more)
    )


# What a case must have, and the mistake in it.
MISTAKES: dict[str, tuple[tuple[str, ...], Callable[[], Patch]]] = {
    "": ((), nullcontext),
    "no sums over sequence parts": (("TP 2",), no_sums_over_sequence_parts),
    "keys of own heads": (("TP 2", "MLA"), keys_of_own_heads),
    "keys out of order": (("CP 2",), keys_out_of_order),
    "halved by parts": (("CP 2", "aux_loss"), halved_by_parts),
    "across documents": (("packed documents",), across_documents),
    "experts as dense": (("EP 2",), experts_as_dense),
    "experts as dense, ETP": (("ETP 2",), experts_as_dense),
    "experts as dense, stage 3": (("EP 2", "ZeRO 3"), experts_as_dense),
    "norm of a stage": (("PP 2",), norm_of_a_stage),
    "means of micro-batches again": (("means of the step", "padding mask", "seq_aux_loss"), unweighted),
    "means of micro-batches again, z-loss": (("means of the step", "padding mask", "z-loss"), unweighted),
    "messages mixed": (("PP 2 interleaved", "4 micro-batches"), messages_mixed),
    "norm of experts alone": (("TP 2", "PP 2", "EP 2", "bf16", "half of them dense"), norm_of_experts_alone),
    "mean over replicas": (("replicas x 2",), partial(loss_divided_by, lambda engine: engine.dp_world_size)),
    "mean over micro-batches": (
        ("2 micro-batches",),
        partial(loss_divided_by, lambda engine: engine.gradient_accumulation_steps()),
    ),
    "without z-loss": (("z-loss",), without_z_loss),
    "fading with replicas": (("global_aux_loss", "replicas x 2"), fading_with_replicas),
    "balanced twice": (("seq_aux_loss",), balanced_twice),
    "balanced twice, aux_loss": (("aux_loss",), balanced_twice),
    "bias without updates": (("expert bias",), bias_without_updates),
    "padding as tokens": (("padding mask", "seq_aux_loss"), padding_as_tokens),
    "other experts again": (("recompute iteration",), other_experts_again),
    "other experts again, layer": (("recompute layer",), other_experts_again),
    "lost rows": (("deduplicated", "EP 2"), lost_rows),
    "chunks in wrong order": (("2 chunks",), chunks_in_wrong_order),
    "another capacity": (("capacity",), another_capacity),
    "another capacity, padded": (("padded capacity",), another_capacity),
}
