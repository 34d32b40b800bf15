"""What becomes of each flag of a Megatron-LM training: a setting, nothing, or a reason why there is no counterpart.

Defaults are those of Megatron-Core 0.19.2. docs/from-megatron.md shows the table.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from coe_megatron.chain.settings import ChainSettings

Value = Any  # of a setting


@dataclass(frozen=True)
class Flag:
    """What becomes of one flag.

    Attributes:
        setting: the setting that gets its value, or the settings that it takes part in; empty for none.
        read: what reads its value; None if it has none, or if a function below reads it.
        on: value of the setting when a flag without a value is given.
        default: Megatron's default, if it is not ours; None to leave ours.
        note: why no setting is needed, or why there is none.
        needless: whether nothing is lost without a setting.
    """

    setting: str = ""
    read: Callable[[str], Value] | None = None
    on: Value = None
    default: Value = None
    note: str = ""
    needless: bool = False


def _each(names: str, flag: Flag) -> dict[str, Flag]:
    return {f"--{name}": flag for name in names.split()}


def _values(read: Callable[[str], Value], **settings: str | tuple[str, Value]) -> dict[str, Flag]:
    """Flags with a value that becomes the value of a setting, given with Megatron's default if that is not ours."""
    pairs = {name: (given, None) if isinstance(given, str) else given for name, given in settings.items()}
    return {
        f"--{name.replace('_', '-')}": Flag(setting, read, default=value) for name, (setting, value) in pairs.items()
    }


def _switches(**settings: tuple[str, Value, Value]) -> dict[str, Flag]:
    """Flags without a value: the setting, its value with the flag, and without it (None: ours)."""
    return {f"--{name.replace('_', '-')}": Flag(at, None, on, off) for name, (at, on, off) in settings.items()}


def _together(names: str, settings: str) -> dict[str, Flag]:
    """Flags that decide settings with others, by the functions below."""
    return _each(names, Flag(settings))


def _none(names: str, why: str) -> dict[str, Flag]:
    """Flags without a counterpart."""
    return _each(names, Flag(note=why))


def _needless(names: str, why: str) -> dict[str, Flag]:
    """Flags that need no setting."""
    return _each(names, Flag(note=why, needless=True))


def whole(text: str) -> int:
    return int(float(text)) if re.fullmatch(r"\d+(\.0*)?e\d+", text) else int(text)


def frequency(text: str) -> Value:
    """`--moe-layer-freq`: a number, or a list of 0 and 1 such as ([0]*1+[1]*26)."""
    if text.isdigit():
        return int(text)
    part = r"\[([01,]+)\](?:\*(\d{1,4}))?"
    bare = re.sub(r"[\s()]", "", text)
    if not re.fullmatch(rf"{part}(\+{part})*", bare):
        raise ValueError(text)
    parts = re.findall(part, bare)
    return [int(digit) for digits, count in parts for digit in re.findall("[01]", digits) * int(count or 1)]


FLAGS: dict[str, Flag] = {
    # model
    **_values(
        whole,
        num_layers="model.num_layers",
        hidden_size="model.hidden_size",
        num_attention_heads="model.num_attention_heads",
        kv_channels="model.kv_channels",
        seq_length="model.seq_length",
        rotary_base="model.rotary_base",
        padded_vocab_size="model.vocab_size",
    ),
    **_values(str, normalization=("model.normalization", "LayerNorm")),
    **_values(
        float,
        norm_epsilon=("model.layernorm_epsilon", 1e-5),
        hidden_dropout=("model.hidden_dropout", 0.1),
        attention_dropout=("model.attention_dropout", 0.1),
        init_method_std="model.init_method_std",
    ),
    **_switches(
        swiglu=("model.activation", "swiglu", "gelu"),
        qk_layernorm=("model.qk_layernorm", True, None),
        untie_embeddings_and_output_weights=("model.untied_embeddings", True, False),
    ),
    **_together("group-query-attention num-query-groups", "model.num_query_groups"),
    **_together("ffn-hidden-size", "model.ffn_hidden_size"),
    **_together("vocab-size make-vocab-size-divisible-by", "model.vocab_size"),
    **_together(
        "multi-latent-attention kv-lora-rank q-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim", "model.mla"
    ),
    **_together("rotary-scaling-factor mscale mscale-all-dim rope-type", "model.mla"),
    **_together("position-embedding-type use-rotary-position-embeddings no-position-embedding", "always rope"),
    **_needless("disable-bias-linear", "linear layers have no biases"),
    **_needless("max-position-embeddings", "rotary positions have no table"),
    **_none("add-qkv-bias", "linear layers have no biases"),
    **_none("squared-relu quick-geglu openai-gelu", "model.activation is swiglu or gelu"),
    **_none(
        "use-rope-scaling rope-scaling-factor rotary-percent rotary-interleaved "
        "rotary-seq-len-interpolation-factor no-rope-freq yarn-original-max-position-embeddings",
        "positions are rotary, with YaRN for MLA only",
    ),
    **_none(
        "window-size window-attn-skip-freq softmax-type experimental-attention-variant qk-l2-norm qk-clip "
        "attention-output-gate",
        "attention is full and causal",
    ),
    **_none("init-method-xavier-uniform embedding-init-method-std use-mup", "weights are normal with init_method_std"),
    **_none("apply-layernorm-1p apply-residual-connection-post-layernorm fp32-residual-connection", "not in the model"),
    **_none("mtp-num-layers mtp-loss-scaling-factor", "there is no multi-token prediction"),
    # experts
    **_values(
        whole,
        num_experts="moe.num_experts",
        moe_router_topk=("moe.topk", 2),
        moe_router_num_groups="moe.num_groups",
        moe_router_group_topk="moe.group_topk",
    ),
    **_values(frequency, moe_layer_freq="moe.layer_freq"),
    **_values(
        str, moe_router_score_function="moe.score_function", moe_token_dispatcher_type=("moe.dispatcher", "allgather")
    ),
    **_values(
        float,
        moe_router_topk_scaling_factor="moe.scaling",
        moe_z_loss_coeff="moe.z_loss_coeff",
        moe_router_bias_update_rate="moe.expert_bias_rate",
        moe_input_jitter_eps="moe.input_jitter",
        moe_expert_capacity_factor="moe.capacity_factor",
    ),
    **_switches(
        moe_router_enable_expert_bias=("moe.expert_bias", True, None),
        moe_pad_expert_input_to_capacity=("moe.pad_to_capacity", True, None),
        moe_router_force_load_balancing=("moe.force_load_balancing", True, None),
    ),
    **_together("moe-ffn-hidden-size", "moe.ffn_hidden_size"),
    **_together("moe-shared-expert-intermediate-size", "moe.num_shared_experts"),
    **_together("moe-router-pre-softmax", "moe.renormalise"),
    **_together("moe-router-load-balancing-type", "moe.load_balancing"),
    **_together("moe-aux-loss-coeff", "moe.aux_loss_coeff"),
    **_together("recompute-granularity recompute-modules moe-layer-recompute recompute-activations", "moe.recompute"),
    **_together("moe-token-drop-policy", "always probs"),
    **_needless("moe-router-dtype", "routers compute in fp32"),
    **_needless(
        "moe-grouped-gemm moe-permute-fusion moe-router-fusion", "experts are always grouped; nothing is fused"
    ),
    **_none("moe-shared-expert-gate moe-latent-size moe-apply-probs-on-input moe-use-upcycling", "not in the layer"),
    **_none("moe-enable-deepep moe-flex-dispatcher-backend", "moe.dispatcher is alltoall or allgather"),
    **_none(
        "moe-shared-expert-overlap overlap-moe-expert-parallel-comm delay-wgrad-compute", "a chain cannot overlap these"
    ),
    **_none("recompute-method recompute-num-layers", "recompute acts on the experts of every layer"),
    # chain
    **{
        f"--coe-{name.name.replace('_', '-')}": Flag(
            f"chain.{name.name}", None if name.type is bool else str, on=True if name.type is bool else None
        )
        for name in fields(ChainSettings)
    },
    "--coe-recompute": Flag("moe.recompute", str),
    **_together("spec", "chain.iterations"),
    # optimizer
    **_values(
        float,
        lr="optimizer.lr",
        min_lr="optimizer.min_lr",
        adam_eps="optimizer.eps",
        weight_decay="optimizer.weight_decay",
    ),
    **_together("adam-beta1 adam-beta2", "optimizer.betas"),
    **_together("clip-grad", "optimizer.clip"),
    **_together("optimizer", "always AdamW"),
    **_together("lr-decay-style", "optimizer.decay"),
    **_together("lr-warmup-iters lr-warmup-samples lr-warmup-fraction", "optimizer.warmup"),
    **_together("lr-decay-iters lr-decay-samples", "training.steps"),
    **_together("lr-wsd-decay-iters lr-wsd-decay-samples lr-wsd-decay-style", "optimizer.cooldown"),
    **_none("lr-warmup-init", "warm-up starts from zero"),
    **_none("start-weight-decay end-weight-decay weight-decay-incr-style", "the weight decay is constant"),
    **_none("decoupled-lr decoupled-min-lr", "all weights have one learning rate"),
    **_none("apply-wd-to-qk-layernorm", "norms have no weight decay"),
    # training
    **_values(
        whole,
        micro_batch_size="training.micro_batch",
        seed="training.seed",
        log_interval=("training.log_every", 100),
    ),
    **_switches(
        bf16=("training.precision", "bf16", "fp32"),
        deterministic_mode=("training.deterministic", True, None),
        async_save=("training.background_saving", True, None),
    ),
    **_together("global-batch-size", "training.global_batch"),
    **_together("train-iters train-samples", "training.steps"),
    **_together("eval-interval", "training.evaluate_every"),
    **_together("eval-iters", "data.validation_samples"),
    **_together("save-interval", "training.save_every"),
    **_values(str, save="output"),
    **_together("load", "a run resumes from its output"),
    **_none(
        "fp16 loss-scale initial-loss-scale min-loss-scale loss-scale-window hysteresis",
        "training.precision is fp32 or bf16",
    ),
    **_none("fp8-format fp8-recipe fp8-param-gather fp4-format", "a chain has no FP8 or FP4"),
    **_none("rampup-batch-size step-batch-size-schedule", "training.global_batch is constant"),
    **_none(
        "finetune pretrained-checkpoint ckpt-step no-load-optim no-load-rng",
        "training.warm_start starts from the weights of one of our checkpoints",
    ),
    **_none(
        "profile profile-step-start profile-step-end profile-ranks use-pytorch-profiler",
        "profile.first_step, profile.steps and profile.ranks do this",
    ),
    **_none("exit-interval exit-duration-in-mins", "launchers stop a run before the time limit (docs/slurm.md)"),
    **_none("cuda-graph-impl enable-cuda-graph cuda-graph-scope", "a chain runs without CUDA graphs"),
    # data
    **_together("reset-position-ids reset-attention-mask", "data.reset_at_documents"),
    **_none(
        "data-path train-data-path valid-data-path test-data-path data-args-path per-split-data-args-path "
        "split data-cache-path mock-data",
        "prepare the text with prepare_data.py and name its folder in data.path or data.blend",
    ),
    **_none(
        "tokenizer-type tokenizer-model vocab-file merge-file tiktoken-pattern",
        "prepare_data.py takes a SentencePiece model, or trains one",
    ),
    **_none("eod-mask-loss fim-data dataloader-inter-document-masking", "every token of a document is a label"),
    # layout
    **_values(
        whole,
        tensor_model_parallel_size="parallel.tensor",
        pipeline_model_parallel_size="parallel.pipeline",
        expert_model_parallel_size="parallel.expert",
    ),
    **_switches(optimizer_cpu_offload=("zero.offload_optimizer", True, None)),
    **_together("expert-tensor-parallel-size", "parallel.expert_tensor"),
    **_together("nnodes nproc-per-node", "parallel.world_size"),
    **_together("use-megatron-fsdp data-parallel-sharding-strategy", "zero.stage"),
    **_together("context-parallel-size", "always 1"),
    **_needless("sequence-parallel", "always with tensor parallelism"),
    **_needless("use-distributed-optimizer", "ZeRO shards optimizer states from stage 1 on"),
    **_none(
        "num-layers-per-virtual-pipeline-stage num-virtual-stages-per-pipeline-rank "
        "pipeline-model-parallel-layout decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers",
        "stages have equal numbers of layers",
    ),
    **_none("cp-comm-type hierarchical-context-parallel-sizes", "there is no context parallelism"),
    # what launches, or changes neither model nor result
    **_needless(
        "node-rank master-addr master-port rdzv-backend rdzv-endpoint rdzv-id standalone max-restarts tee log-dir",
        "torchrun's; docs/launching.md",
    ),
    **_needless(
        "transformer-impl use-mcore-models attention-backend use-flash-attn no-masked-softmax-fusion "
        "no-bias-gelu-fusion no-bias-swiglu-fusion no-bias-dropout-fusion no-rope-fusion "
        "no-gradient-accumulation-fusion no-persist-layer-norm attention-softmax-in-fp32 "
        "accumulate-allreduce-grads-in-fp32 cross-entropy-loss-fusion cross-entropy-fusion-impl "
        "overlap-grad-reduce overlap-param-gather tp-comm-overlap no-overlap-p2p-communication "
        "ddp-bucket-size calculate-per-token-loss te-rng-tracker use-cpu-initialization enable-experimental "
        "manual-gc manual-gc-interval empty-unused-memory-level num-workers dataloader-type no-mmap-bin-files "
        "no-create-attention-mask-in-dataloader num-dataset-builder-threads distributed-backend "
        "distributed-timeout-minutes high-priority-stream-groups",
        "how Megatron computes, not what",
    ),
    **_needless(
        "ckpt-format use-dist-ckpt dist-ckpt-format dist-ckpt-strictness auto-detect-ckpt-format "
        "ckpt-fully-parallel-save ckpt-fully-parallel-load ckpt-assume-constant-structure no-save-optim "
        "use-persistent-ckpt-worker exit-signal-handler",
        "docs/checkpoints.md",
    ),
    **_needless(
        "tensorboard-dir tensorboard-log-interval tensorboard-queue-size log-throughput log-progress "
        "log-params-norm log-num-zeros-in-grad log-timers-to-tensorboard log-memory-to-tensorboard "
        "log-validation-ppl-to-tensorboard log-device-memory-used log-world-size-to-tensorboard "
        "moe-per-layer-logging timing-log-level timing-log-option logging-level "
        "no-check-for-nan-in-loss-and-grad",
        "docs/metrics.md",
    ),
    **_together("wandb-project wandb-exp-name wandb-save-dir wandb-entity", "logging.wandb"),
}


def flag_table() -> str:
    """`FLAGS` as a Markdown table, for docs/from-megatron.md: flags of one kind share a row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, flag in FLAGS.items():
        if flag.setting:
            is_name = re.fullmatch(r"(\w+\.)*\w+", flag.setting) is not None
            becomes = f"`{flag.setting}`" if is_name else flag.setting
        else:
            becomes = ("nothing to set" if flag.needless else "**no counterpart**") + f": {flag.note}"
        default = (
            "" if flag.default is None else f"`{str(flag.default).lower() if flag.default is False else flag.default}`"
        )
        rows.setdefault((becomes, default), []).append(f"`{name}`")
    head = "| flag | becomes | if the flag is missing |\n|---|---|---|\n"
    return head + "".join(
        f"| {', '.join(names)} | {becomes} | {default} |\n" for (becomes, default), names in rows.items()
    )
