"""Every setting of a run, one small frozen dataclass per concern. Defaults are the small model of the quickstart.

Loaded and checked by `coe_megatron.config.load`; nothing here imports torch.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from coe_megatron.chain.settings import ChainSettings, Recompute
from coe_megatron.errors import ConfigError
from coe_megatron.files import expand_user

Dispatcher = Literal["alltoall", "deduplicated", "allgather", "auto"]
LARGEST = 2**31 - 1  # the largest 32-bit size or seed of torch and numpy
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Index = Annotated[int, Field(ge=0, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PathText = Annotated[str, AfterValidator(expand_user)]  # of a file or folder; ~ is expanded
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class MLASettings:
    """Multi-latent attention (MLA, DeepSeek-V2); null selects MHA or GQA.

    Attributes:
        kv_lora_rank: width of the compressed keys and values.
        q_lora_rank: width of compressed queries; null projects queries directly from the hidden state.
        qk_head_dim: size of the part of a query or key head without rotary position.
        qk_pos_emb_head_dim: size of the part with rotary position; all heads share its key.
        v_head_dim: size of a value head.
        pad_values: on CUDA, pad value heads that are smaller than query heads, so that torch's flash attention accepts
            them instead of its memory-efficient kernel; costs their memory. On CPU they are always padded.
        rotary_scaling_factor: factor by which YaRN extends the context; 1 disables YaRN.
        original_max_position_embeddings: context length before YaRN extends it.
        mscale: YaRN's scale of cosine and sine.
        mscale_all_dim: YaRN's scale of the attention scores.
    """

    kv_lora_rank: Count = 512
    q_lora_rank: Count | None = None
    qk_head_dim: Count = 128
    qk_pos_emb_head_dim: Count = 64
    v_head_dim: Count = 128
    pad_values: bool = False
    rotary_scaling_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    original_max_position_embeddings: Count = 4096
    mscale: Positive = 0.707
    mscale_all_dim: Positive = 0.707


@dataclass(frozen=True)
class ModelSettings:
    """The transformer outside the experts; names and meanings are Megatron-Core's.

    Attributes:
        num_layers: transformer layers.
        hidden_size: width of the residual stream.
        num_attention_heads: query heads.
        num_query_groups: key/value heads of grouped-query attention; as many as heads when null.
        kv_channels: size of a head; hidden_size / num_attention_heads when null. Unused with `mla`.
        ffn_hidden_size: width of dense layers (where `moe.layer_freq` has any); 4 x hidden_size when null.
        seq_length: tokens per sample.
        vocab_size: rows of the embedding; the tokenizer's size rounded up to a multiple of 64 when null. Data without a
            tokenizer need it.
        activation: of experts and dense layers.
        normalization: of every norm.
        layernorm_epsilon: of every norm.
        qk_layernorm: normalise queries and keys; `mla` always normalises its latents.
        qk_norm_over_heads: with `qk_layernorm`, one norm over all heads of the queries and one over those of the keys
            (OLMoE), not a norm of each head; not with tensor parallelism or Transformer Engine.
        qkv_bias: biases of queries, keys and values (Qwen2); not with `mla`.
        rotary_base: theta of the rotary position embedding.
        untied_embeddings: the output layer has weights of its own.
        hidden_dropout: dropout of the attention and expert outputs, before they are added to the residual stream.
        attention_dropout: dropout of the attention weights.
        init_method_std: standard deviation of the normal weight initialisation.
        scaled_init: divide the output layers' standard deviation by sqrt(2 x num_layers), as Megatron does and the
            paper does not.
        mla: multi-latent attention instead of MHA or GQA; `{}` selects its defaults.
        backend: where experts, linear layers, norms and attention come from: torch and Megatron-Core (`local`), or
            Transformer Engine, which needs CUDA and bf16 and was not run on a GPU yet. Checkpoints fit both.
    """

    num_layers: Annotated[int, Field(ge=1, le=10_000)] = 4
    hidden_size: Count = 128
    num_attention_heads: Count = 4
    num_query_groups: Count | None = None
    kv_channels: Count | None = None
    ffn_hidden_size: Count | None = None
    seq_length: Count = 128
    vocab_size: Count | None = None
    activation: Literal["swiglu", "gelu"] = "swiglu"
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    layernorm_epsilon: Positive = 1e-6
    qk_layernorm: bool = False
    qk_norm_over_heads: bool = False
    qkv_bias: bool = False
    rotary_base: Count = 10_000
    untied_embeddings: bool = True
    hidden_dropout: Fraction = 0.0
    attention_dropout: Fraction = 0.0
    init_method_std: Positive = 0.02
    scaled_init: bool = True
    mla: MLASettings | None = None
    backend: Literal["local", "transformer_engine"] = "local"


@dataclass(frozen=True)
class MoESettings:
    """The experts, and the routing of tokens to them in every iteration.

    Attributes:
        num_experts: N, the routed experts of a layer.
        topk: K, the experts per token in one iteration.
        ffn_hidden_size: width of one expert.
        num_shared_experts: M; each processes every token in every iteration; computed as one expert of M times the
            width.
        shared_expert_gate: multiply the shared experts' output by a learned gate, sigmoid(w · x) (Qwen2-MoE).
        layer_freq: one MoE layer in every `layer_freq` layers, or a list of 0 (dense) and 1 (MoE), one entry per layer.
        score_function: from router logits to scores.
        renormalise: divide a token's K gates by their sum (softmax scores only).
        scaling: factor on all gates.
        num_groups: group-limited routing: number of groups of consecutive experts; null for none. A group in each node
            of an expert-parallel group (`parallel.expert` x `parallel.expert_tensor` / `parallel.ranks_per_node`
            nodes), or several, limits the nodes to which a token goes; `--dry-run` says to how many.
        group_topk: group-limited routing: number of groups a token may choose experts from in an iteration.
        router_init: `normal` as all other weights (Megatron), or `kaiming_uniform` with a = sqrt(5) (the paper's code).
        load_balancing: auxiliary loss: `seq_aux_loss` balances each sequence, `aux_loss` each micro-batch of a rank,
            `global_aux_loss` the micro-batches of the step so far, on all ranks; `none` disables it.
        aux_loss_coeff: coefficient of the auxiliary loss (`chain.aux_loss_reduction` says how it scales with
            iterations).
        z_loss_coeff: coefficient of the router's z-loss; 0 for none.
        auxiliary_mean: whether `seq_aux_loss` and the z-loss are means over the tokens of a `micro_batch`, as in
            Megatron, or of the `step`. They differ where rows have padding; with `step` the split into micro-batches
            does not matter.
        expert_bias: auxiliary-loss-free load balancing: a bias on the scores, for the choice of experts only, updated
            after each step (sigmoid scores only).
        expert_bias_rate: size of an update of the expert bias.
        input_jitter: in training the router's input is multiplied by uniform noise in [1 - input_jitter, 1 +
            input_jitter].
        capacity_factor: capacity of an expert as a multiple of its mean load without padding tokens; copies above it
            are dropped, lowest gates first; null drops nothing.
        pad_to_capacity: pad every expert's input to its capacity, so that sizes are fixed.
        dispatcher: how tokens travel to the ranks of their experts: `alltoall`, a copy for each expert;
            `deduplicated`, one for each rank that holds some of a token's experts, and their sum back; `allgather`,
            all tokens to all ranks (Megatron-Core's); `auto`, the faster one of the first two by closed forms and
            `parallel.network`; `--dry-run` says which and why, and config.yaml in the run's folder records it.
        overlap_chunks: parts of a micro-batch's tokens that go through the chain in turns: one part's experts work
            while another part's tokens travel; 1 to wait for all; `auto` for 1, 2 or 4, chosen as `dispatcher` is.
        force_load_balancing: for benchmarks only: random logits replace the router's, so that the load is uniform, as
            `--dry-run` assumes; the model learns nothing useful.
        recompute: activations that the backward pass recomputes: `none`; `experts`, the activation function between an
            expert's two matrix products; `iteration`, one iteration at a time; `layer`, the whole chain at once.
    """

    num_experts: Count = 64
    topk: Count = 4
    ffn_hidden_size: Count = 88
    num_shared_experts: Index = 1
    shared_expert_gate: bool = False
    layer_freq: Count | list[Literal[0, 1]] = 1
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = False
    scaling: Positive = 1.0
    num_groups: Count | None = None
    group_topk: Count | None = None
    router_init: Literal["normal", "kaiming_uniform"] = "normal"
    load_balancing: Literal["none", "aux_loss", "seq_aux_loss", "global_aux_loss"] = "seq_aux_loss"
    aux_loss_coeff: NonNegative = 0.001
    z_loss_coeff: NonNegative = 0.0
    auxiliary_mean: Literal["micro_batch", "step"] = "micro_batch"
    expert_bias: bool = False
    expert_bias_rate: NonNegative = 0.001
    input_jitter: Fraction = 0.0
    capacity_factor: Positive | None = None
    pad_to_capacity: bool = False
    dispatcher: Dispatcher = "alltoall"
    overlap_chunks: Count | Literal["auto"] = 1
    force_load_balancing: bool = False
    recompute: Recompute = "none"

    def resolved_chunks(self) -> int:
        """`overlap_chunks`, where it and `dispatcher` are resolved.

        Raises:
            ConfigError: one of them is `auto`.
        """
        if self.dispatcher == "auto" or self.overlap_chunks == "auto":
            name = "dispatcher" if self.dispatcher == "auto" else "overlap_chunks"
            raise ConfigError(f"moe.{name} is auto: coe_megatron.estimate.dispatch.resolved replaces it")
        return self.overlap_chunks


@dataclass(frozen=True)
class BlendPart:
    """One corpus of a blend.

    Attributes:
        path: a folder written by `launch/prepare_data.py`, or the prefix of an indexed dataset of Megatron.
        weight: its share of the samples, relative to the sum of all weights.
    """

    path: PathText
    weight: Annotated[float, Field(gt=0, le=1e18)]  # the sum of many stays finite


@dataclass(frozen=True)
class DataSettings:
    """Training and validation data: folders written by `launch/prepare_data.py`, all with the same tokenizer, and
    indexed datasets of Megatron. A path PREFIX names one of these if the files PREFIX.bin and PREFIX.idx exist.

    Attributes:
        path: the folder or prefix. A prefix has no validation split and no tokenizer: set `validation`, and
            `model.vocab_size` if there is no prepared folder.
        blend: several folders or prefixes instead of `path`, whose samples are drawn in these proportions; each corpus
            has its own epochs.
        validation: name -> folder whose validation split is evaluated, or prefix of which all is; the name labels its
            loss. When null: `path`, named `valid`, or the folders of `blend`, by their names.
        samples: `row` makes each document one sample, truncated or padded to seq_length, without loss on padding;
            `packed` cuts the concatenated documents into full samples.
        reset_at_documents: in packed samples, mask attention to earlier documents, and count positions from 0 in each.
        answer_tokens: in rows, loss on only so many tokens of a document, the last ones before the end of the document,
            such as 1 if each document is a question and an answer of one token; null for loss on all.
        validation_samples: samples per validation set in an evaluation; all when null.
    """

    path: PathText = "data/builtin"
    blend: list[BlendPart] | None = None
    validation: dict[str, PathText] | None = None
    samples: Literal["row", "packed"] = "row"
    reset_at_documents: bool = False
    answer_tokens: Count | None = None
    validation_samples: Count | None = None


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning rate; norms and biases have no weight decay.

    Attributes:
        lr: the learning rate after warm-up.
        min_lr: the learning rate at the end of the decay.
        warmup: share of the steps over which the learning rate rises linearly from zero.
        decay: schedule after warm-up: `constant`; `linear` or `cosine` down to `min_lr`; or `wsd`, constant and then
            linear down to `min_lr`.
        cooldown: share of the steps at the end over which `wsd` decays.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: of AdamW, for matrices only.
        decay_routers: apply weight decay to the routers too.
        clip: largest global gradient norm; null disables clipping.
    """

    lr: Positive = 3e-4
    min_lr: NonNegative = 0.0
    warmup: Fraction = 0.1
    decay: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    cooldown: Fraction = 0.2
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.01
    decay_routers: bool = True
    clip: Positive | None = 1.0


@dataclass(frozen=True)
class ParallelSettings:
    """Parallel sizes; the remaining factor of the world size is data parallelism. Checked in config/layout.py.

    Attributes:
        tensor: TP, ranks that shard attention, shared experts and embedding, with sequence parallelism in between.
        context: CP, ranks that each have a part of every sequence; attention gathers keys and values of all parts (with
            `model.backend` transformer_engine they go round in a ring).
        pipeline: PP, stages of layers (ZeRO stages 0 and 1).
        virtual_pipeline: VPP, parts of consecutive layers in each stage, which take turns (Megatron's interleaved
            schedule).
        expert: EP, ranks that share the experts of a layer.
        expert_tensor: ETP, ranks that shard each expert; independent of `tensor`.
        world_size: required number of ranks; null accepts any. `--dry-run` assumes it.
        ranks_per_node: ranks per node, from which `--dry-run` and `auto` settings separate traffic within nodes from
            traffic across nodes.
        network: the node check's report (`launch/check_nodes.py --report`), by whose bandwidth and latency settings
            that are `auto` are chosen, and `--dry-run` predicts times; null: they are chosen by bytes alone.
    """

    tensor: Count = 1
    context: Count = 1
    pipeline: Annotated[int, Field(ge=1, le=256)] = 1
    virtual_pipeline: Annotated[int, Field(ge=1, le=256)] = 1
    expert: Count = 1
    expert_tensor: Count = 1
    world_size: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    ranks_per_node: Count = 8
    network: PathText | None = None


@dataclass(frozen=True)
class ZeroSettings:
    """DeepSpeed ZeRO: what is sharded over the replicas (data and context parallel) instead of replicated.

    Attributes:
        stage: 0 nothing (fp32 only); 1 optimizer states; 2 also gradients; 3 also weights.
        offload_optimizer: keep optimizer states in host memory, and update weights there (stages 1 to 3).
        offload_parameters: keep weights in host memory (stage 3).
        deepspeed: a DeepSpeed config (JSON) that is merged over ours, such as
            `{"zero_optimization": {"overlap_comm": false}}`. It must not contain what a setting here decides (batch
            size, precision, clipping, stage, optimizer).
    """

    stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False
    offload_parameters: bool = False
    deepspeed: PathText | None = None


@dataclass(frozen=True)
class TrainingSettings:
    """Length of training, batch sizes, precision, and when to log, evaluate and save.

    Attributes:
        steps: optimizer steps of the run.
        global_batch: samples per step, over all ranks.
        micro_batch: samples per forward pass on a rank; a step accumulates gradients over the micro-batches.
        seed: seed of initial weights and dropout.
        data_seed: seed of the order of samples, and of the order of documents in packed samples, those of validation
            sets included; `seed` when null.
        precision: `bf16` is bf16 weights and activations with fp32 master weights; `fp32` is fp32 throughout.
        log_every: steps between two lines of metrics.
        evaluate_every: steps between two evaluations; the last step is always evaluated.
        evaluate_answers: number of word problems that the model is asked in evaluations, greedily, for
            `answer_accuracy` in the metrics; 0 for none. Rank 0 gathers the whole model, and needs `coe-megatron[hf]`.
        answers_file: JSONL with the problems, such as GSM8K's; null for built-in problems that training never sees.
        save_every: steps between two checkpoints; the last step is always saved.
        keep_checkpoints: number of most recent checkpoints to keep.
        milestones: further steps after which a checkpoint is saved, which is never deleted.
        background_saving: write checkpoints in the background while training continues, from a copy of the states in
            host memory (16 bytes per parameter, over the ranks that shard it).
        warm_start: a checkpoint, or a run's folder for its most recent one, whose weights initialise a new run; steps,
            optimizer states, data and schedule start from the beginning. null starts from random weights.
        branch_from: a checkpoint of a run with the same settings and another number of `steps`, from which a new run
            continues: weights, optimizer states, data and step. So runs of several lengths share their beginning; the
            learning rate has to be the same up to there (`optimizer.decay: wsd`). null starts with the first step.
        deterministic: use deterministic algorithms: the same bits in every run on the same devices; slower on CUDA.
    """

    steps: Count = 400
    global_batch: Count = 32
    micro_batch: Count = 16
    seed: Index = 1234
    data_seed: Index | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    log_every: Count = 10
    evaluate_every: Count = 100
    evaluate_answers: Index = 0
    answers_file: PathText | None = None
    save_every: Count = 200
    keep_checkpoints: Count = 2
    milestones: list[Count] = field(default_factory=list)
    background_saving: bool = False
    warm_start: PathText | None = None
    branch_from: PathText | None = None
    deterministic: bool = False

    @property
    def order_seed(self) -> int:
        """The seed of the order of data: `data_seed`, or `seed` when it is null."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight, and of an element of an activation."""
        return 2 if self.precision == "bf16" else 4


@dataclass(frozen=True)
class LoggingSettings:
    """Where metrics are written in addition to metrics.jsonl, which every run has.

    Attributes:
        tensorboard: write `tensorboard/` in the run's folder.
        wandb: log to Weights & Biases; needs the package `wandb` and, unless WANDB_MODE is offline, an account. Its own
            environment variables apply: WANDB_PROJECT (default coe_megatron), WANDB_NAME (default the last part of
            `output`), WANDB_ENTITY.
    """

    tensorboard: bool = True
    wandb: bool = False


@dataclass(frozen=True)
class ProfileSettings:
    """A window of steps recorded by torch's profiler, which writes `profile/` in the run's folder.

    Attributes:
        first_step: first step (1-based) of the window; null disables profiling.
        steps: number of steps in the window.
        memory: also record allocations, in the trace and, on CUDA, as a snapshot for torch's memory viewer.
        ranks: ranks to profile.
    """

    first_step: Count | None = None
    steps: Count = 3
    memory: bool = False
    ranks: list[Index] = field(default_factory=lambda: [0])


@dataclass(frozen=True)
class RecoverySettings:
    """Limits after which a run recovers from a hang, or from NaN or exploding losses.

    Attributes:
        hang_after: timeout in seconds: if no step, evaluation or checkpoint completes in this time, every rank writes
            its stack traces to `stacks/` in the run's folder and exits with status 7. Must exceed the longest of these.
            null disables it.
        skips: number of consecutive skipped steps (loss or a gradient not finite, or loss too large) after which the
            run rolls back to its most recent complete checkpoint and skips the data since then.
        rollbacks: largest number of rollbacks of a run; after it the run exits with status 4.
        loss_factor: also skip a step whose loss exceeds this multiple of the median loss of the last 50 applied steps;
            null skips only if loss or gradients are not finite.
    """

    hang_after: Positive | None = 1800.0
    skips: Count = 5
    rollbacks: Index = 2
    loss_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run.

    Attributes:
        output: the run's folder, for config, metrics, TensorBoard and checkpoints.
    """

    output: PathText = "runs/quickstart"
    model: ModelSettings = field(default_factory=ModelSettings)
    moe: MoESettings = field(default_factory=MoESettings)
    chain: ChainSettings = field(default_factory=ChainSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    zero: ZeroSettings = field(default_factory=ZeroSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    recovery: RecoverySettings = field(default_factory=RecoverySettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)
    profile: ProfileSettings = field(default_factory=ProfileSettings)


# Settings that may differ between the attempts of a run: they change what is logged and kept, the number of steps, or
# the parallel layout.
_MAY_CHANGE = {
    "output",
    "data.path",  # checkpoints record the text and its weights
    "data.blend",
    "model.backend",  # checkpoints of both are alike
    "moe.dispatcher",  # only the order of sums differs
    "moe.overlap_chunks",
    "moe.recompute",
    "training.steps",
    "training.branch_from",  # of use only where a run has no checkpoints yet
    "training.micro_batch",  # another layout may need another; a step has the same samples
    "training.log_every",
    "training.evaluate_every",
    "training.evaluate_answers",
    "training.answers_file",
    "training.save_every",
    "training.keep_checkpoints",
    "training.milestones",
    "training.background_saving",
}
# Any layout and ZeRO stage reads the checkpoints of any other.
_SECTIONS_THAT_MAY_CHANGE = ("data.validation", "logging.", "parallel.", "profile.", "recovery.", "zero.")


def may_change(name: str) -> bool:
    """Whether a run may resume with another value of a setting, named like `moe.topk`."""
    return name in _MAY_CHANGE or name.startswith(_SECTIONS_THAT_MAY_CHANGE)
