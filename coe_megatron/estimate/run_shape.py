"""`RunShape`: a run's config, vocabulary size and layout, from which all estimates are computed."""

from dataclasses import dataclass, replace
from functools import cached_property

from coe_megatron.chain.settings import Recompute
from coe_megatron.config import layout as layouts
from coe_megatron.config.layout import Layout, chain_pattern, moe_pattern
from coe_megatron.config.settings import RunConfig
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.activations import PassSettings, Scores
from coe_megatron.estimate.closed_forms import ModelShape
from coe_megatron.estimate.measured_network import MeasuredNetwork


@dataclass(frozen=True)
class RunShape:
    """A run, as the input of all estimates.

    Attributes:
        config: its settings.
        vocab_size: rows of the embedding, including padding.
        layout: its parallel layout.
        network: what `parallel.network` names, if it has been read.

    Raises:
        ConfigError: a setting is `auto`.
    """

    config: RunConfig
    vocab_size: int
    layout: Layout
    network: MeasuredNetwork | None = None

    def __post_init__(self) -> None:
        self.config.moe.resolved_chunks()

    @classmethod
    def of(cls, config: RunConfig, vocab_size: int, world_size: int | None = None) -> "RunShape":
        """The shape of a run without `auto`; `world_size` as in `config.layout.layout`."""
        return cls(config, vocab_size, layouts.layout(config, world_size))

    def changed(self, config: RunConfig) -> "RunShape":
        """The shape with another config, but the same world size, vocabulary and network."""
        return replace(self, config=config, layout=layouts.layout(config, self.layout.world_size))

    @property
    def ranks_on_a_node(self) -> int:
        """Ranks that share a node, by `parallel.ranks_per_node`."""
        return min(self.config.parallel.ranks_per_node, self.layout.world_size)

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step on each replica."""
        return self.config.training.global_batch // (self.config.training.micro_batch * self.layout.data)

    @property
    def tokens_per_replica(self) -> int:
        """Tokens per step on each replica of the dense parameters."""
        return self.config.training.global_batch * self.config.model.seq_length // self.layout.replicas

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of weights and hidden states."""
        return self.config.training.element_bytes

    @cached_property
    def model(self) -> ModelShape:
        """The shape of the model, for the closed forms."""
        config, model, moe, mla = self.config, self.config.model, self.config.moe, self.config.model.mla
        return ModelShape(
            layers=model.num_layers,
            hidden=model.hidden_size,
            vocab=self.vocab_size,
            heads=model.num_attention_heads,
            seq_length=model.seq_length,
            experts=moe.num_experts,
            topk=moe.topk,
            expert_ffn=moe.ffn_hidden_size,
            shared_ffn=moe.num_shared_experts * moe.ffn_hidden_size,
            dense_ffn=model.ffn_hidden_size or 4 * model.hidden_size,
            moe_layers=moe_pattern(config),
            chains=None if config.chain.layers is None else chain_pattern(config),
            attention="mla" if mla else "mha",
            kv_groups=model.num_query_groups,
            head_dim=model.kv_channels,
            kv_lora_rank=mla.kv_lora_rank if mla else 0,
            q_lora_rank=mla.q_lora_rank if mla else None,
            qk_nope=mla.qk_head_dim if mla else 0,
            qk_rope=mla.qk_pos_emb_head_dim if mla else 0,
            v_head_dim=mla.v_head_dim if mla else 0,
            qk_layernorm=model.qk_layernorm,
            qk_norm_over_heads=model.qk_norm_over_heads,
            qkv_bias=model.qkv_bias,
            shared_gate=moe.shared_expert_gate,
            layer_norm=model.normalization == "LayerNorm",
            swiglu=model.activation == "swiglu",
            untied_embeddings=model.untied_embeddings,
            chain=config.chain,
        )

    def stage_model(self, stage: int) -> ModelShape:
        """The layers of a pipeline stage (from 0), with embedding and output layer as in the complete model."""
        if stage not in self._stage_models:
            self._stage_models[stage] = self._stage_model(stage)
        return self._stage_models[stage]

    @cached_property
    def _stage_models(self) -> dict[int, ModelShape]:
        return {}

    def _stage_model(self, stage: int) -> ModelShape:
        own, pattern, chains = layouts.stage_layers(self.config, stage), moe_pattern(self.config), self.model.chains
        return replace(
            self.model,
            layers=len(own),
            moe_layers=tuple(pattern[layer] for layer in own),
            chains=None if chains is None else tuple(chains[layer] for layer in own),
        )

    def pass_settings(self, recompute: Recompute | None = None) -> PassSettings:
        """A micro-batch's pass through the complete model; `recompute` replaces the run's own mode."""
        moe = self.config.moe
        scores: Scores = "renormalised" if moe.renormalise else moe.score_function
        return PassSettings(
            micro_batch=self.config.training.micro_batch,
            element_bytes=self.element_bytes,
            recompute=recompute or moe.recompute,
            scores=scores,
            balanced=moe.load_balancing != "none" and moe.aux_loss_coeff > 0,
            z_loss=moe.z_loss_coeff > 0,
            jitter=moe.input_jitter > 0,
            dropout=self.config.model.hidden_dropout > 0,
            expert_parallel=self.layout.expert,
            tensor=self.layout.tensor,
            context=self.layout.context,
            expert_tensor=self.layout.expert_tensor,
            deduplicated=moe.dispatcher == "deduplicated",
            groups=(moe.num_groups, moe.group_topk),
        )

    def stage_pass(self, stage: int, recompute: Recompute | None = None) -> PassSettings:
        """The passes of a pipeline stage: under 1F1B, stage p of P keeps at most P - p micro-batches.

        Of V parts, which take turns, it keeps 2 (P - p - 1) + P (V - 1) + 1 passes, each through one part.
        """
        stages, parts = self.layout.pipeline, self.layout.virtual_pipeline
        passes = stages - stage if parts == 1 else 2 * (stages - stage - 1) + stages * (parts - 1) + 1
        in_flight = min(passes if parts == 1 else passes / parts, self.micro_batches)
        complete = self.pass_settings(recompute)
        return replace(complete, first=stage == 0, last=stage == stages - 1, in_flight=in_flight)


def padded_vocabulary(config: RunConfig, tokenizer_size: int) -> int:
    """Rows of the embedding: `model.vocab_size`, or the tokenizer's size rounded up to a multiple of 64.

    Raises:
        ConfigError: `model.vocab_size` is smaller than the tokenizer.
    """
    wanted = config.model.vocab_size
    if wanted is None:
        return -(-tokenizer_size // 64) * 64
    if wanted < tokenizer_size:
        raise ConfigError(
            f"model.vocab_size is {wanted}: the tokenizer has {tokenizer_size} pieces; set at least that many, "
            "or null for the tokenizer's size"
        )
    return wanted
