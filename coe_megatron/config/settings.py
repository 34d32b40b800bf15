"""Every setting of a run, one small frozen dataclass per concern. Defaults are the small model of the quickstart.

Loaded and checked by `coe_megatron.config.load`; nothing here imports torch.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from coe_megatron.chain.settings import ChainSettings, Recompute
from coe_megatron.files import expand_user

LARGEST = 2**31 - 1  # what torch's and numpy's 32-bit sizes and seeds hold
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Index = Annotated[int, Field(ge=0, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PathText = Annotated[str, AfterValidator(expand_user)]  # of a file or folder; ~ stands for the user's home
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class MLASettings:
    """Multi-latent attention (DeepSeek-V2); without it attention is MHA or GQA.

    Attributes:
        kv_lora_rank: width of the compressed keys and values.
        q_lora_rank: width of compressed queries; null takes queries straight from the hidden state.
        qk_head_dim: size of a query and key head, its part without position.
        qk_pos_emb_head_dim: size of its part with rotary position, one key of which all heads share.
        v_head_dim: size of a value head.
        rotary_scaling_factor: above 1 it switches YaRN on and stretches positions by so much.
        original_max_position_embeddings: positions YaRN stretches.
        mscale: YaRN's scale of cosine and sine.
        mscale_all_dim: YaRN's scale of the attention scores.
    """

    kv_lora_rank: Count = 512
    q_lora_rank: Count | None = None
    qk_head_dim: Count = 128
    qk_pos_emb_head_dim: Count = 64
    v_head_dim: Count = 128
    rotary_scaling_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    original_max_position_embeddings: Count = 4096
    mscale: Positive = 0.707
    mscale_all_dim: Positive = 0.707


@dataclass(frozen=True)
class ModelSettings:
    """The transformer around the experts; names and meanings are Megatron-Core's.

    Attributes:
        num_layers: transformer layers.
        hidden_size: width of the residual stream.
        num_attention_heads: query heads.
        num_query_groups: key/value heads of grouped-query attention; as many as heads when null.
        kv_channels: size of a head; hidden_size / num_attention_heads when null. Unused with `mla`.
        ffn_hidden_size: width of dense layers (where `moe.layer_freq` has any); 4 x hidden_size when null.
        seq_length: tokens of a sample.
        vocab_size: rows of the embedding; the tokenizer's size rounded up to a multiple of 64 when null.
        activation: of experts and dense layers.
        normalization: of every norm.
        layernorm_epsilon: of every norm.
        qk_layernorm: norms on queries and keys; with `mla` the latents have theirs anyway.
        rotary_base: theta of the rotary positions.
        untied_embeddings: the output layer has weights of its own.
        hidden_dropout: of what attention and experts add to the residual stream.
        attention_dropout: of the attention weights.
        init_method_std: standard deviation of the normal initialisation.
        scaled_init: Megatron's division of the output layers' deviation by sqrt(2 x layers); the paper has none.
        mla: multi-latent attention instead of MHA or GQA; `{}` takes its defaults.
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
    rotary_base: Count = 10_000
    untied_embeddings: bool = True
    hidden_dropout: Fraction = 0.0
    attention_dropout: Fraction = 0.0
    init_method_std: Positive = 0.02
    scaled_init: bool = True
    mla: MLASettings | None = None


@dataclass(frozen=True)
class MoESettings:
    """The experts and how tokens are routed to them, in every iteration.

    Attributes:
        num_experts: N, the routed experts of a layer.
        topk: K, the experts a token goes to in one iteration.
        ffn_hidden_size: width of one expert.
        num_shared_experts: M; they see every token in every iteration, and are computed as one of M times the width.
        layer_freq: an expert layer every so many layers, or a list of 0 (dense) and 1 (experts), one per layer.
        score_function: what makes scores of the router's logits.
        renormalise: divide a token's K gates by their sum (softmax scores only).
        scaling: factor of all gates.
        num_groups: group-limited routing: into how many groups the experts fall; null for none.
        group_topk: group-limited routing: from how many groups a token chooses.
        router_init: `normal` as all other weights (Megatron), or `kaiming_uniform` with a = sqrt(5) (the paper's code).
        load_balancing: auxiliary loss: `seq_aux_loss` balances each sequence, `aux_loss` each micro-batch of a rank,
            `global_aux_loss` the micro-batches of all ranks, those before it in the step included; `none` for no loss.
        aux_loss_coeff: its coefficient (how it scales with the iterations: `chain.aux_loss_reduction`).
        z_loss_coeff: coefficient of the router's z-loss; 0 for none.
        expert_bias: balance without a loss: a bias on the choice, moved after each step (sigmoid scores only).
        expert_bias_rate: by how much it moves.
        input_jitter: in training the router's input is multiplied by noise from 1 - this to 1 + this.
        capacity_factor: drop what exceeds this multiple of an expert's mean load without padding, the copies with the
            lowest gates; null drops nothing.
        pad_to_capacity: fill every expert up to its capacity, for fixed sizes.
        dispatcher: how tokens travel to the experts' ranks.
        force_load_balancing: for benchmarks alone: random logits in place of the router's, so that a run is as fast as
            with the uniform routing that `--dry-run` assumes; what it learns is worth nothing.
        recompute: what the backward pass computes again instead of keeping it: `none`; `experts`, what lies between the
            two products of an expert; `iteration`, each iteration on its own; `layer`, the whole chain at once.
    """

    num_experts: Count = 64
    topk: Count = 4
    ffn_hidden_size: Count = 88
    num_shared_experts: Index = 1
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
    expert_bias: bool = False
    expert_bias_rate: NonNegative = 0.001
    input_jitter: Fraction = 0.0
    capacity_factor: Positive | None = None
    pad_to_capacity: bool = False
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    force_load_balancing: bool = False
    recompute: Recompute = "none"


@dataclass(frozen=True)
class BlendPart:
    """One of the corpora of a blend.

    Attributes:
        path: a folder that `launch/prepare_data.py` wrote.
        weight: its share of the samples, relative to the other weights.
    """

    path: PathText
    weight: Annotated[float, Field(gt=0, le=1e18)]  # many of them have a sum


@dataclass(frozen=True)
class DataSettings:
    """What to train on: folders that `launch/prepare_data.py` wrote, all with the same tokenizer.

    Attributes:
        path: the folder.
        blend: several folders, whose samples are drawn in these proportions, in place of `path`; each goes through
            epochs of its own.
        validation: folders to validate on (their validation split), by the names their losses shall have; when null
            that of `path`, named `valid`, or those of `blend`, named as their folders are.
        samples: `row` makes each document one sample, cut or padded to seq_length, with the loss on what is not
            padding; `packed` cuts the concatenated documents into full samples.
        reset_at_documents: in packed samples attention does not see earlier documents and positions begin at 0 in each.
        validation_samples: how many samples of each validation set an evaluation reads; all when null.
    """

    path: PathText = "data/builtin"
    blend: list[BlendPart] | None = None
    validation: dict[str, PathText] | None = None
    samples: Literal["row", "packed"] = "row"
    reset_at_documents: bool = False
    validation_samples: Count | None = None


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning rate; weight decay spares norms and biases.

    Attributes:
        lr: the learning rate after warm-up.
        min_lr: to which it falls.
        warmup: share of the steps over which it rises from zero.
        decay: what follows warm-up: `constant`; `linear` or `cosine` down to `min_lr`; or `wsd`, constant and then
            linear down to `min_lr` over the last `cooldown` share of the steps.
        cooldown: that share.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: of AdamW, for matrices alone.
        decay_routers: the routers' matrices decay as well.
        clip: largest global gradient norm; null does not clip.
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
    """How the ranks divide the work; what is left of them is data parallelism. config/layout.py says what is valid.

    Attributes:
        tensor: TP, the ranks that cut attention, shared experts and embedding, and the sequence in between.
        pipeline: PP, the stages of consecutive layers (ZeRO stages 0 and 1).
        expert: EP, the ranks that divide the experts of a layer among them.
        expert_tensor: ETP, the ranks that cut every expert; independent of `tensor`.
        world_size: number of ranks the run is meant for; null takes as many as are started. `--dry-run` counts on it.
        ranks_per_node: how many of them a node has; `--dry-run` tells traffic inside nodes from that across them.
    """

    tensor: Count = 1
    pipeline: Annotated[int, Field(ge=1, le=256)] = 1
    expert: Count = 1
    expert_tensor: Count = 1
    world_size: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    ranks_per_node: Count = 8


@dataclass(frozen=True)
class ZeroSettings:
    """DeepSpeed ZeRO: what the data-parallel ranks hold a part of each, instead of all of it.

    Attributes:
        stage: 0 nothing (fp32 only); 1 the optimizer's states; 2 gradients as well; 3 weights as well.
        offload_optimizer: keep the optimizer's states, and step, in host memory (stages 1 to 3).
        offload_parameters: keep the weights of stage 3 in host memory.
        deepspeed: a JSON file in DeepSpeed's own words, whose keys are merged over ours, such as
            `{"zero_optimization": {"overlap_comm": false}}`. What a setting here decides (batch, precision, clipping,
            stage, optimizer) it must not say.
    """

    stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False
    offload_parameters: bool = False
    deepspeed: PathText | None = None


@dataclass(frozen=True)
class TrainingSettings:
    """How long, how fast, and what is written on the way.

    Attributes:
        steps: optimizer steps of the whole run.
        global_batch: samples a step, over all ranks.
        micro_batch: samples a rank passes at once; what lies between the two is gradient accumulation.
        seed: of weights, dropout and the order of samples.
        precision: `bf16` trains bf16 weights with fp32 master weights, `fp32` everything in fp32.
        log_every: steps between two lines of metrics.
        evaluate_every: steps between two validations; the last step always has one.
        save_every: steps between two checkpoints; the last step always saves one.
        keep_checkpoints: how many of the newest stay.
        milestones: steps after which a checkpoint is saved as well, and never deleted.
        background_saving: training goes on while a checkpoint is written; until then a copy of the states stays in host
            memory (16 bytes a parameter, divided among the ranks that share it).
        warm_start: a checkpoint, or the folder of a run for its newest one, whose weights a new run begins with;
            steps, optimizer states, data and schedule begin anew. null begins with random weights.
        deterministic: choose algorithms that give the same bits in every run on the same devices; slower on CUDA.
    """

    steps: Count = 400
    global_batch: Count = 32
    micro_batch: Count = 16
    seed: Index = 1234
    precision: Literal["fp32", "bf16"] = "fp32"
    log_every: Count = 10
    evaluate_every: Count = 100
    save_every: Count = 200
    keep_checkpoints: Count = 2
    milestones: list[Count] = field(default_factory=list)
    background_saving: bool = False
    warm_start: PathText | None = None
    deterministic: bool = False

    @property
    def element_bytes(self) -> int:
        """Of a weight, and of an element of an activation."""
        return 2 if self.precision == "bf16" else 4


@dataclass(frozen=True)
class LoggingSettings:
    """Where metrics go beside metrics.jsonl, which every run writes.

    Attributes:
        tensorboard: write `tensorboard/` in the run's folder.
        wandb: send them to Weights & Biases; needs the package `wandb` and, unless WANDB_MODE is offline, an account.
            Its own variables say where to (WANDB_PROJECT, else coe_megatron; WANDB_NAME, else the last part of
            `output`; WANDB_ENTITY).
    """

    tensorboard: bool = True
    wandb: bool = False


@dataclass(frozen=True)
class ProfileSettings:
    """A window of steps that torch's profiler watches; what it writes lies in `profile/` of the run's folder.

    Attributes:
        first_step: the first step (1-based) of the window; null profiles nothing.
        steps: how many.
        memory: record allocations too: in the trace and, on CUDA, as a snapshot for torch's memory viewer.
        ranks: which ranks are profiled.
    """

    first_step: Count | None = None
    steps: Count = 3
    memory: bool = False
    ranks: list[Index] = field(default_factory=lambda: [0])


@dataclass(frozen=True)
class RecoverySettings:
    """What is done when something goes wrong.

    Attributes:
        hang_after: seconds without a step, an evaluation or a checkpoint done after which every rank writes its stacks
            to `stacks/` in the run's folder and ends with exit status 7; more than the longest of these takes. null
            waits for ever.
        skips: steps in a row that are left out, since their loss or a gradient is not finite or the loss too large,
            before the run rolls back to its newest whole checkpoint and goes past the data since then.
        rollbacks: how often in all a run rolls back; then it ends with exit status 4, for a person to decide.
        loss_factor: a step whose loss is more than so many times the median of the last 50 is left out too; null leaves
            out only what is not finite.
    """

    hang_after: Positive | None = 1800.0
    skips: Count = 5
    rollbacks: Index = 2
    loss_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None


@dataclass(frozen=True)
class RunConfig:
    """One run, whole.

    Attributes:
        output: its folder, for config, metrics, TensorBoard and checkpoints.
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


# What may differ between the attempts of one run: it changes what is shown and kept, how far the run goes, or how the
# work is divided.
_MAY_CHANGE = {
    "output",
    "data.path",  # checkpoints remember the text and its weights themselves
    "data.blend",
    "moe.recompute",
    "training.steps",
    "training.micro_batch",  # another layout may need another, and a step takes the same samples
    "training.log_every",
    "training.evaluate_every",
    "training.save_every",
    "training.keep_checkpoints",
    "training.milestones",
    "training.background_saving",
}
# Any layout and ZeRO stage reads the checkpoints of any other.
_SECTIONS_THAT_MAY_CHANGE = ("data.validation", "logging.", "parallel.", "profile.", "recovery.", "zero.")


def may_change(name: str) -> bool:
    """Whether a run may go on with another value of a setting, named as `moe.topk`."""
    return name in _MAY_CHANGE or name.startswith(_SECTIONS_THAT_MAY_CHANGE)
