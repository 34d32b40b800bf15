"""The routed experts of one rank as two grouped matrix products, on CPU and CUDA.

T: rows (token copies) on this rank, sorted by expert; E: experts on this rank; D: hidden; F: expert ffn on this rank.

Weight layout: `weight1` [E, 2F, D] (gate rows above value rows; [E, F, D] without gating) and `weight2` [E, D, F],
each expert in the orientation of `torch.nn.Linear`. Checkpoints hold them under the keys, shapes and shards of
Megatron's `SequentialMLP` and `TEGroupedMLP` (`experts.experts.linear_fc1.weight`, one slice per expert, gate and
value separate), so each can load the other's.
"""

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from megatron.core.utils import divide

from coe_megatron.alignment import row_multiple
from coe_megatron.errors import ConfigError
from coe_megatron.local_backend.expert_activation import FusedSwiGLU, OtherActivation, SwiGLU
from coe_megatron.local_backend.expert_mlp import Activation, Assignment, ExpertMLP, WeightGradients


class GroupedExperts(MegatronModule):
    """E experts with `torch.nn.functional.grouped_mm`; replaces Megatron's `SequentialMLP`.

    Initialisation does not depend on the layout: with the same torch seed on all ranks, expert i of a layer starts with
    the same weights on any rank and with any expert tensor parallelism.

    Args:
        num_local_experts: E.
        submodules, name: ignored; Megatron-Core 0.16.1 and 0.19.2 pass them.
        pg_collection: groups `ep`, `expt_tp`, `expt_dp`.
        recompute: keep only the first product, and recompute the activation in the backward pass. This keeps 2F
            instead of 3F numbers per row (without gating F instead of 2F), at the cost of elementwise work. Keeping
            nothing would also recompute the first product, two thirds of an expert's forward pass; recomputing the
            whole iteration then saves more.

    Raises:
        ConfigError: the config asks for what grouped products do not offer here.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        recompute: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        _refuse_unsupported(config)
        assert pg_collection is not None
        self.recompute = recompute
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group = pg_collection.ep, pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        ffn, halves = config.moe_ffn_hidden_size, 2 if config.gated_linear_unit else 1
        local_ffn = divide(ffn, self.tp_group.size())
        _require_aligned("hidden_size", config.hidden_size, 1, config.params_dtype)
        _require_aligned("moe_ffn_hidden_size", ffn, self.tp_group.size(), config.params_dtype)
        self.weight1 = self._empty(halves * local_ffn, config.hidden_size, tp_axis=0)
        self.weight2 = self._empty(config.hidden_size, local_ffn, tp_axis=1)
        self._activation = _activation(config)
        if config.perform_initialization:
            self._initialise(ffn, halves)

    def _empty(self, rows: int, columns: int, tp_axis: int) -> torch.nn.Parameter:
        weight = torch.empty(
            (self.num_local_experts, rows, columns),
            dtype=self.config.params_dtype,
            device=torch.cuda.current_device(),
        )
        parameter = torch.nn.Parameter(weight)
        if self.config.tensor_model_parallel_size > 1:  # gradient norms count unmarked parameters on one rank only
            set_tensor_model_parallel_attributes(parameter, True, dim=tp_axis + 1, stride=1)
        # Megatron's mark for gradients that are reduced over the replicas of an expert. These differ from the replicas
        # of dense parameters also when ETP differs from TP.
        dense = self.ep_group.size() == 1 and self.tp_group.size() == self.config.tensor_model_parallel_size
        parameter.allreduce = dense  # type: ignore[attr-defined]
        return parameter

    @torch.no_grad()
    def _initialise(self, ffn: int, halves: int) -> None:
        """Draw each expert's full weights from its own seed and keep this rank's shard."""
        layer_seed = int(torch.randint(2**62, (), device="cpu"))  # the same on all ranks
        first, tp, rank = (
            self.ep_group.rank() * self.num_local_experts,
            self.tp_group.size(),
            self.tp_group.rank(),
        )
        full1 = self.weight1.new_empty(halves * ffn, self.config.hidden_size)
        full2 = self.weight2.new_empty(self.config.hidden_size, ffn)
        devices = [self.weight1.device] if self.weight1.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            for local in range(self.num_local_experts):
                torch.manual_seed(layer_seed + first + local)
                self.config.init_method(full1)
                self.config.output_layer_init_method(full2)
                parts = [half.chunk(tp)[rank] for half in full1.chunk(halves)]
                self.weight1[local].copy_(torch.cat(parts))
                self.weight2[local].copy_(full2.chunk(tp, dim=1)[rank])

    def forward(
        self,
        hidden_RD: torch.Tensor | Assignment,
        tokens_per_expert: torch.Tensor | None = None,
        probs_R: torch.Tensor | None = None,
        *,
        gradients: WeightGradients | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, None]:
        """Apply each expert to its rows, weighted by their gates before the second product.

        Args:
            hidden_RD: an assignment of tokens; or, as Megatron calls its experts, rows sorted by expert.
            tokens_per_expert: with rows, [E] integers with sum R; may contain zeros.
            probs_R: with rows, the gate g[t,i] of each (paper eq. 7).
            gradients: of `weight_gradients`, which sums those of several calls; None for a single call.

        Returns:
            The sum over each token's experts [M, D]; with rows, their results [R, D] and None for Megatron's bias.
        """
        mlp = ExpertMLP((self.weight1, self.weight2), self._activation, not self.recompute)
        gradients = gradients or self.weight_gradients()
        if isinstance(hidden_RD, Assignment):
            return mlp(hidden_RD, gradients)
        assert tokens_per_expert is not None and probs_R is not None
        ends_E = tokens_per_expert.to(hidden_RD.device, non_blocking=True).cumsum(0, dtype=torch.int32)
        slots_R = torch.arange(len(hidden_RD), device=hidden_RD.device)
        return mlp(Assignment(hidden_RD, probs_R.unsqueeze(-1), slots_R, ends_E), gradients), None

    def weight_gradients(self) -> WeightGradients | None:
        """What sums the weights' gradients over the iterations of a chain; None if there will be none."""
        needs_gradients = torch.is_grad_enabled() and self.weight1.requires_grad
        return WeightGradients(self.weight1, self.weight2) if needs_gradients else None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Both weights under the keys of Megatron's experts, one shard per expert (and per half of a gated fc1)."""
        halves = 2 if self.config.gated_linear_unit else 1
        return {
            f"{prefix}weight1": self._factory(
                f"{prefix}experts.linear_fc1.weight", self.weight1, halves, 0, sharded_offsets
            ),
            f"{prefix}weight2": self._factory(
                f"{prefix}experts.linear_fc2.weight", self.weight2, 1, 1, sharded_offsets
            ),
            f"{prefix}_extra_state": self._extra_states(prefix, sharded_offsets),
        }

    def get_extra_state(self) -> None:
        """None; Megatron's linear layers have an extra state for Transformer Engine."""

    def set_extra_state(self, state: object) -> None:
        """Ignored."""

    def _extra_states(self, prefix: str, offsets: tuple) -> list[ShardedObject]:
        """The empty extra states of Megatron's experts, which refuse a checkpoint without them."""
        experts = self.ep_group.size() * self.num_local_experts
        first = self.ep_group.rank() * self.num_local_experts
        replica = (0, self.tp_group.rank(), self.dp_group.rank())
        return [
            make_sharded_object_for_checkpoint(
                None,
                f"{prefix}experts.{linear}._extra_state",
                (*offsets, (len(offsets), first + local, experts)),
                replica_id=replica,
            )
            for linear in ("linear_fc1", "linear_fc2")
            for local in range(self.num_local_experts)
        ]

    def _factory(
        self, key: str, weight: torch.Tensor, halves: int, tp_axis: int, offsets: tuple
    ) -> ShardedTensorFactory:
        """Splits a weight [E, rows, columns] into Megatron's shards for saving, and merges loaded shards."""
        experts = self.ep_group.size() * self.num_local_experts
        first = self.ep_group.rank() * self.num_local_experts
        tp, rank = self.tp_group.size(), self.tp_group.rank()
        axes, shape = len(offsets), weight.shape  # taken now: ZeRO-3 may release the weight later

        def build(key: str, weight: torch.Tensor, replica_id: tuple, _range: object) -> list[ShardedTensor]:
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    part,
                    *offsets,
                    (axes, first + local, experts),
                    (axes + 1 + tp_axis, half * tp + rank, halves * tp),
                    replica_id=replica_id,
                    prepend_axis_num=axes + 1,
                )
                for local, expert in enumerate(weight.unbind(0))
                for half, part in enumerate(expert.chunk(halves))
            ]

        @torch.no_grad()
        def merge(parts: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat(parts).view(shape) if halves > 1 else torch.stack(parts)

        return ShardedTensorFactory(key, weight, build, merge, replica_id=(0, 0, self.dp_group.rank()))


def _require_aligned(name: str, size: int, parts: int, dtype: torch.dtype) -> None:
    """That each of so many parts has rows that `grouped_mm` takes."""
    step = row_multiple(dtype.itemsize) * parts
    if size % step:
        raise ConfigError(
            f"{name} is {size}: grouped experts need a multiple of {step} in {dtype} with expert tensor parallel "
            f"size {parts}"
        )


def _activation(config: TransformerConfig) -> Activation:
    if not (config.gated_linear_unit and config.activation_func is F.silu):
        return OtherActivation(config.activation_func, config.gated_linear_unit)
    return FusedSwiGLU() if config.bias_activation_fusion else SwiGLU()


def _refuse_unsupported(config: TransformerConfig) -> None:
    unsupported = {
        "add_bias_linear": config.add_bias_linear,
        "moe_apply_probs_on_input": config.moe_apply_probs_on_input,
        "moe_latent_size": config.moe_latent_size is not None,
        "activation_func_clamp_value": config.activation_func_clamp_value is not None,
        "glu_linear_offset": config.glu_linear_offset != 0.0,
        "use_te_activation_func": config.use_te_activation_func,
        "fine_grained_activation_offloading": config.fine_grained_activation_offloading,
        "init_model_with_meta_device": config.init_model_with_meta_device,
    }
    for name, is_set in unsupported.items():
        if is_set:
            raise ConfigError(
                f"{name} is {getattr(config, name)!r}: grouped experts in torch do not support it; "
                "leave it at Megatron's default or use Transformer Engine's experts"
            )
