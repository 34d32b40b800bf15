"""What the closed forms need to know of a run: its settings as a ModelShape."""

from dataclasses import replace

from coe_megatron.chain.settings import Recompute
from coe_megatron.config.layout import chain_pattern, moe_pattern
from coe_megatron.config.settings import RunConfig
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.activations import Pass, Scores
from coe_megatron.estimate.closed_forms import ModelShape


def model_shape(config: RunConfig, vocab_size: int) -> ModelShape:
    """The run's model for the closed forms; `vocab_size` counts the padded rows of the embedding."""
    model, moe, mla = config.model, config.moe, config.model.mla
    return ModelShape(
        layers=model.num_layers,
        hidden=model.hidden_size,
        vocab=vocab_size,
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
        layer_norm=model.normalization == "LayerNorm",
        swiglu=model.activation == "swiglu",
        untied_embeddings=model.untied_embeddings,
        chain=config.chain,
    )


def training_pass(config: RunConfig, recompute: Recompute | None = None) -> Pass:
    """The run's micro-batch for `coe_megatron.estimate.activations`; `recompute` takes the place of the run's own."""
    moe = config.moe
    scores: Scores = "renormalised" if moe.renormalise else moe.score_function
    return Pass(
        micro_batch=config.training.micro_batch,
        element=config.training.element_bytes,
        recompute=recompute or moe.recompute,
        scores=scores,
        balanced=moe.load_balancing != "none" and moe.aux_loss_coeff > 0,
        z_loss=moe.z_loss_coeff > 0,
        jitter=moe.input_jitter > 0,
        dropout=config.model.hidden_dropout > 0,
        expert_parallel=config.parallel.expert,
        tensor=config.parallel.tensor,
        expert_tensor=config.parallel.expert_tensor,
    )


def stage_shape(config: RunConfig, shape: ModelShape, stage: int) -> ModelShape:
    """The layers of a pipeline stage (from 0) of the model `shape`; embedding and output layer count as in `shape`."""
    layers = shape.layers // config.parallel.pipeline
    own = slice(stage * layers, (stage + 1) * layers)
    chains = None if shape.chains is None else shape.chains[own]
    return replace(shape, layers=layers, moe_layers=moe_pattern(config)[own], chains=chains)


def stage_pass(run: Pass, stage: int, stages: int, micro_batches: int) -> Pass:
    """The passes of a pipeline stage: under 1F1B stage p of P keeps P - p micro-batches, if there are so many."""
    in_flight = min(stages - stage, micro_batches)
    return replace(run, first=stage == 0, last=stage == stages - 1, in_flight=in_flight)


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
            f"model.vocab_size is {wanted}: the tokenizer has {tokenizer_size} pieces, so at least that many, "
            "or null for as many as it has"
        )
    return wanted
