"""Settings from the command line of a Megatron-LM training, without Megatron-LM.

`FLAGS` says of each flag which setting it becomes, that it needs none, or why there is none. Flags that depend on each
other are put together by the functions below it. The defaults are those of Megatron-Core 0.19.2. docs/from-megatron.md
shows the table.
"""

import difflib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.config.settings import RunConfig
from coe_megatron.errors import ConfigError

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


def _whole(text: str) -> int:
    return int(float(text)) if re.fullmatch(r"\d+(\.0*)?e\d+", text) else int(text)


def _frequency(text: str) -> Value:
    """`--moe-layer-freq`: a number, or a Python list of 0 and 1 with + and *."""
    if text.isdigit():
        return int(text)
    if not re.fullmatch(r"[\[\]\s01,]+(\*\d{1,4})?(\+[\[\]\s01,]+(\*\d{1,4})?)*", text):
        raise ValueError(text)
    layers: list[int] = []
    for part, count in re.findall(r"\[([\s01,]*)\](?:\*(\d+))?", text):
        layers += [int(digit) for digit in re.findall(r"[01]", part)] * int(count or 1)
    return layers


FLAGS: dict[str, Flag] = {
    # model
    **_values(
        _whole,
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
    **_together("multi-latent-attention kv-lora-rank q-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim", "model.mla"),
    **_together("rotary-scaling-factor mscale mscale-all-dim rope-type", "model.mla"),
    **_together("position-embedding-type use-rotary-position-embeddings no-position-embedding", "always rope"),
    **_needless("disable-bias-linear", "linear layers have no biases"),
    **_needless("max-position-embeddings", "rotary positions have no table"),
    **_none("add-qkv-bias", "linear layers have no biases"),
    **_none("squared-relu quick-geglu openai-gelu", "model.activation is swiglu or gelu"),
    **_none("use-rope-scaling rope-scaling-factor rotary-percent rotary-interleaved rotary-seq-len-interpolation-factor "
            "no-rope-freq yarn-original-max-position-embeddings", "positions are rotary, with YaRN for MLA only"),
    **_none("window-size window-attn-skip-freq softmax-type experimental-attention-variant qk-l2-norm qk-clip "
            "attention-output-gate", "attention is full and causal"),
    **_none("init-method-xavier-uniform embedding-init-method-std use-mup", "weights are normal with init_method_std"),
    **_none("apply-layernorm-1p apply-residual-connection-post-layernorm fp32-residual-connection", "not in the model"),
    **_none("mtp-num-layers mtp-loss-scaling-factor", "there is no multi-token prediction"),
    # experts
    **_values(
        _whole,
        num_experts="moe.num_experts",
        moe_router_topk=("moe.topk", 2),
        moe_router_num_groups="moe.num_groups",
        moe_router_group_topk="moe.group_topk",
    ),
    **_values(_frequency, moe_layer_freq="moe.layer_freq"),
    **_values(str, moe_router_score_function="moe.score_function", moe_token_dispatcher_type=("moe.dispatcher", "allgather")),
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
    **_needless("moe-grouped-gemm moe-permute-fusion moe-router-fusion", "experts are always grouped; nothing is fused"),
    **_none("moe-shared-expert-gate moe-latent-size moe-apply-probs-on-input moe-use-upcycling", "not in the layer"),
    **_none("moe-enable-deepep moe-flex-dispatcher-backend", "moe.dispatcher is alltoall or allgather"),
    **_none("moe-shared-expert-overlap overlap-moe-expert-parallel-comm delay-wgrad-compute", "a chain cannot overlap these"),
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
        _whole,
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
    **_none("fp16 loss-scale initial-loss-scale min-loss-scale loss-scale-window hysteresis", "training.precision is fp32 or bf16"),
    **_none("fp8-format fp8-recipe fp8-param-gather fp4-format", "a chain has no FP8 or FP4"),
    **_none("rampup-batch-size step-batch-size-schedule", "training.global_batch is constant"),
    **_none("finetune pretrained-checkpoint ckpt-step no-load-optim no-load-rng",
            "training.warm_start starts from the weights of one of our checkpoints"),
    **_none("profile profile-step-start profile-step-end profile-ranks use-pytorch-profiler",
            "profile.first_step, profile.steps and profile.ranks do this"),
    **_none("exit-interval exit-duration-in-mins", "launchers stop a run before the time limit (docs/slurm.md)"),
    **_none("cuda-graph-impl enable-cuda-graph cuda-graph-scope", "a chain runs without CUDA graphs"),
    # data
    **_together("reset-position-ids reset-attention-mask", "data.reset_at_documents"),
    **_none("data-path train-data-path valid-data-path test-data-path data-args-path per-split-data-args-path split "
            "data-cache-path mock-data",
            "prepare the text with prepare_data.py and name its folder in data.path or data.blend"),
    **_none("tokenizer-type tokenizer-model vocab-file merge-file tiktoken-pattern",
            "prepare_data.py takes a SentencePiece model, or trains one"),
    **_none("eod-mask-loss fim-data dataloader-inter-document-masking", "every token of a document is a label"),
    # layout
    **_values(
        _whole,
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
    **_none("num-layers-per-virtual-pipeline-stage num-virtual-stages-per-pipeline-rank pipeline-model-parallel-layout "
            "decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers", "stages have equal numbers of layers"),
    **_none("cp-comm-type hierarchical-context-parallel-sizes", "there is no context parallelism"),
    # what launches, or changes neither model nor result
    **_needless("node-rank master-addr master-port rdzv-backend rdzv-endpoint rdzv-id standalone max-restarts tee log-dir",
                "torchrun's; docs/launching.md"),
    **_needless("transformer-impl use-mcore-models attention-backend use-flash-attn no-masked-softmax-fusion "
                "no-bias-gelu-fusion no-bias-swiglu-fusion no-bias-dropout-fusion no-rope-fusion "
                "no-gradient-accumulation-fusion no-persist-layer-norm attention-softmax-in-fp32 "
                "accumulate-allreduce-grads-in-fp32 cross-entropy-loss-fusion cross-entropy-fusion-impl "
                "overlap-grad-reduce overlap-param-gather tp-comm-overlap no-overlap-p2p-communication ddp-bucket-size "
                "calculate-per-token-loss te-rng-tracker use-cpu-initialization enable-experimental manual-gc "
                "manual-gc-interval empty-unused-memory-level num-workers dataloader-type no-mmap-bin-files "
                "no-create-attention-mask-in-dataloader num-dataset-builder-threads distributed-backend "
                "distributed-timeout-minutes high-priority-stream-groups", "how Megatron computes, not what"),
    **_needless("ckpt-format use-dist-ckpt dist-ckpt-format dist-ckpt-strictness auto-detect-ckpt-format "
                "ckpt-fully-parallel-save ckpt-fully-parallel-load ckpt-assume-constant-structure no-save-optim "
                "use-persistent-ckpt-worker exit-signal-handler", "docs/checkpoints.md"),
    **_needless("tensorboard-dir tensorboard-log-interval tensorboard-queue-size log-throughput log-progress "
                "log-params-norm log-num-zeros-in-grad log-timers-to-tensorboard log-memory-to-tensorboard "
                "log-validation-ppl-to-tensorboard log-device-memory-used log-world-size-to-tensorboard "
                "moe-per-layer-logging timing-log-level timing-log-option logging-level no-check-for-nan-in-loss-and-grad",
                "docs/metrics.md"),
    **_together("wandb-project wandb-exp-name wandb-save-dir wandb-entity", "logging.wandb"),
}  # fmt: skip


@dataclass
class Translation:
    """Settings by their dotted names, and one line for each flag, or missing flag, that has no counterpart."""

    settings: dict[str, Value] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def nested(self) -> dict[str, Any]:
        """The settings as they stand in a YAML file."""
        tree: dict[str, Any] = {section.name: {} for section in fields(RunConfig)}
        for name, value in self.settings.items():
            *sections, last = name.split(".")
            inner = tree
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = value
        return {section: values for section, values in tree.items() if values != {}}


_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::-([^{}]*))?\}|(\w+))")  # $A, ${A} or ${A:-default}


def words(text: str) -> list[str]:
    """The words of a command or a shell script: continued lines and quotes are understood, comments left out.

    Variables that the script sets to plain values are replaced; arrays of arguments are read where they are set.

    Raises:
        ConfigError: a quote is not closed.
    """
    try:
        found = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise ConfigError(f"the command cannot be read: {error}") from None
    variables: dict[str, str] = {}
    kept: list[str] = []
    for word in found:
        value = _VARIABLE.sub(lambda name: variables.get(name[1] or name[3], name[2] or name[0]), word)
        if assignment := re.fullmatch(r"(\w+)=([^()]*)", value, re.DOTALL):
            variables[assignment[1]] = assignment[2]
        else:
            kept += value.split() if word.startswith("$") else [value]
    return kept


def translate(command: Sequence[str]) -> Translation:
    """The settings that train as a command does, as far as they can.

    Raises:
        ConfigError: a flag has no value or an invalid one, or one that a model needs is missing.
    """
    given = _Given(command)
    for part in (_direct, _model, _moe, _chain, _optimizer, _training, _layout):
        part(given)
    return given.translation


class _Given:
    """The flags of a command with their values, and what has been made of them so far."""

    def __init__(self, command: Sequence[str]) -> None:
        self.flags = _flags(command)
        self.translation = Translation()
        for name, values in self.flags.items():
            self._note_unused(name, values)

    def __contains__(self, name: str) -> bool:
        return f"--{name}" in self.flags

    def __setitem__(self, setting: str, value: Value) -> None:
        self.translation.settings[setting] = value

    def __getitem__(self, setting: str) -> Value:
        return self.translation.settings.get(setting)

    def text(self, name: str, default: str = "") -> str:
        return self.value(name, str, default)

    def number(self, name: str, default: int | None = None) -> Any:
        return self.value(name, _whole, default)

    def value(self, name: str, read: Callable[[str], Value], default: Value = None) -> Value:
        """The value of a flag, or the default if it is not given."""
        values = self.flags.get(f"--{name}")
        if values is None:
            return default
        if not values:
            raise ConfigError(f"--{name} has no value")
        try:
            return read(values[0])
        except ValueError:
            kind = {_whole: "an integer", float: "a number", _frequency: "a number or a list of 0 and 1"}[read]
            raise ConfigError(f"--{name} is {values[0]!r}: it must be {kind}") from None

    def required(self, name: str, read: Callable[[str], Value] = _whole) -> Value:
        if name not in self:
            raise ConfigError(f"--{name} is missing")
        return self.value(name, read)

    def note(self, text: str) -> None:
        self.translation.notes.append(text)

    def _note_unused(self, name: str, values: list[str]) -> None:
        shown = " ".join([name, *values])
        if (flag := FLAGS.get(name)) is None:
            near = difflib.get_close_matches(name, FLAGS, n=1, cutoff=0.8)
            self.note(f"{shown}: unknown here{f'; did you mean {near[0]}?' if near else ''}")
        elif flag.note and not flag.needless:
            self.note(f"{shown}: {flag.note}")


_TORCHRUN = {"--nnodes", "--nproc-per-node", "--node-rank", "--master-addr", "--master-port", "--rdzv-backend",
             "--rdzv-endpoint", "--rdzv-id", "--max-restarts", "--log-dir"}  # fmt: skip


def _flags(command: Sequence[str]) -> dict[str, list[str]]:
    """The words after each flag up to the next; of a repeated flag the last counts, as in argparse."""
    flags: dict[str, list[str]] = {}
    values: list[str] = []
    for word in command:
        if re.match(r"--\w", word):
            name, given, value = word.partition("=")
            dashed = name.replace("_", "-")  # torchrun takes both
            values = flags[dashed if dashed in _TORCHRUN else name] = [value] if given else []
        elif re.search(r"\w+=\($|\[@\]|\[\*\]", word) or word in (")", "&&", ";", "|"):
            values = []  # an array of arguments begins, ends, or is used; or another command follows
        else:
            values.append(word.removesuffix(")"))
    return flags


def _direct(given: _Given) -> None:
    """Flags that are settings by themselves."""
    for name, flag in FLAGS.items():
        bare = name.removeprefix("--")
        if flag.read is not None and bare in given:
            value = given.value(bare, flag.read)
            if "$" in str(value):
                given.note(f"{name} {value}: this shell variable has no value here; set {flag.setting}")
            else:
                given[flag.setting] = value
        elif flag.on is not None and bare in given:
            given[flag.setting] = flag.on
        elif flag.default is not None:
            given[flag.setting] = flag.default


def _model(given: _Given) -> None:
    for name in ("num-layers", "hidden-size", "num-attention-heads", "seq-length"):
        given.required(name)
    hidden = given["model.hidden_size"]
    default = int(4 * hidden * 2 / 3 / 64) * 64 if "swiglu" in given else 4 * hidden
    given["model.ffn_hidden_size"] = given.number("ffn-hidden-size", default)
    if "group-query-attention" in given:
        given["model.num_query_groups"] = given.number("num-query-groups", 1)
    if "vocab-size" in given and "padded-vocab-size" not in given:
        multiple = given.number("make-vocab-size-divisible-by", 128) * given.number("tensor-model-parallel-size", 1)
        given["model.vocab_size"] = -(-given.number("vocab-size") // multiple) * multiple
    positions = given.text("position-embedding-type", "learned_absolute")
    if positions != "rope" and "use-rotary-position-embeddings" not in given and "multi-latent-attention" not in given:
        given.note(f"--position-embedding-type {positions} (if not given, Megatron's default): positions are rotary")
    if "disable-bias-linear" not in given:
        given.note("without --disable-bias-linear: Megatron's linear layers then have biases, and ours have none")
    if "multi-latent-attention" in given:
        _latent_attention(given)


def _latent_attention(given: _Given) -> None:
    if "qk-layernorm" not in given:
        given.note("--multi-latent-attention without --qk-layernorm: the latents have norms here")
    given["model.qk_layernorm"] = False  # which model.mla implies
    sizes = {"kv-lora-rank": 32, "q-lora-rank": None, "qk-head-dim": 128, "qk-pos-emb-head-dim": 64, "v-head-dim": 128}
    for name, default in sizes.items():
        given[f"model.mla.{name.replace('-', '_')}"] = given.number(name, default)
    factors = {"rotary-scaling-factor": 1.0, "mscale": 1.0, "mscale-all-dim": 0.0}
    values = {name: given.value(name, float, default) for name, default in factors.items()}
    if given.text("rope-type", "yarn") == "rope" or values["rotary-scaling-factor"] == 1:
        return  # YaRN by the factor 1 is plain RoPE
    for name, value in values.items():
        if value == 0:
            given.note(f"--{name} 0 (if not given, Megatron's default): it must be above 0 here, so ours is used")
        else:
            given[f"model.mla.{name.replace('-', '_')}"] = value


def _moe(given: _Given) -> None:
    if "num-experts" not in given:
        raise ConfigError("--num-experts is missing: only models with experts can be chains")
    width = given.number("moe-ffn-hidden-size", given["model.ffn_hidden_size"])
    given["moe.ffn_hidden_size"] = width
    shared = given.number("moe-shared-expert-intermediate-size", 0)
    given["moe.num_shared_experts"] = shared // width
    if shared % width:
        given.note(
            f"--moe-shared-expert-intermediate-size {shared}: it must be a multiple of an expert's width {width}"
        )
    if given.text("moe-router-score-function", "softmax") == "softmax":
        given["moe.renormalise"] = "moe-router-pre-softmax" not in given
    if given["moe.dispatcher"] not in ("alltoall", "allgather"):
        given.note(f"--moe-token-dispatcher-type {given['moe.dispatcher']}: alltoall is used")
        given["moe.dispatcher"] = "alltoall"
    if (policy := given.text("moe-token-drop-policy", "probs")) != "probs":
        given.note(f"--moe-token-drop-policy {policy}: the lowest gates are dropped first (probs)")
    _balancing(given)
    _recompute(given)


def _balancing(given: _Given) -> None:
    kinds = given.flags.get("--moe-router-load-balancing-type", ["aux_loss"])
    given["moe.load_balancing"] = kinds[0] if kinds else "aux_loss"
    given["moe.aux_loss_coeff"] = given.value("moe-aux-loss-coeff", float, 0.0)
    if len(kinds) > 1 or kinds[0] not in ("none", "aux_loss", "seq_aux_loss", "global_aux_loss"):
        given.note(f"--moe-router-load-balancing-type {' '.join(kinds)}: there is one auxiliary loss at a time")
        given["moe.load_balancing"] = next((kind for kind in kinds if kind.endswith("aux_loss")), "none")


def _recompute(given: _Given) -> None:
    modules = given.flags.get("--recompute-modules", [])
    granularity = given.text("recompute-granularity", "selective" if "recompute-activations" in given else "")
    if granularity == "full" or "moe" in modules or "moe-layer-recompute" in given:
        given["moe.recompute"] = "layer"
    elif "moe_act" in modules:
        given["moe.recompute"] = "experts"
    if granularity == "full":
        given.note("--recompute-granularity full: the experts are recomputed (moe.recompute), attention is not")
    if left := [module for module in modules if module not in ("moe", "moe_act")]:
        given.note(f"--recompute-modules {' '.join(left)}: only experts are recomputed")


def _chain(given: _Given) -> None:
    chains = [name for name in given.flags if name.startswith("--coe-")]
    if "spec" in given and given.flags["--spec"][:1] != ["coe_megatron.megatron_lm"]:
        given.note(f"--spec {' '.join(given.flags['--spec'])}: the layers are ours")
    elif not chains and "spec" not in given:
        given["chain.iterations"] = 1  # Megatron's MoE
    for name in chains:  # given as text: values are read as YAML reads them
        setting = FLAGS[name].setting if name in FLAGS else ""
        if setting == "chain.layers":
            given[setting] = [_number(text) for text in given.flags[name]]
        elif setting and given[setting] is not True:
            given[setting] = _number(given[setting])


def _number(text: str) -> Value:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _optimizer(given: _Given) -> None:
    given.required("lr", float)
    given["optimizer.betas"] = [given.value("adam-beta1", float, 0.9), given.value("adam-beta2", float, 0.999)]
    given["optimizer.clip"] = given.value("clip-grad", float, 1.0) or None
    if (kind := given.text("optimizer", "adam")) != "adam":
        given.note(f"--optimizer {kind}: the optimizer is AdamW")
    steps = given["training.steps"] = _in_steps(given, "train")
    if not steps:
        raise ConfigError("--train-iters is missing")
    style = given.text("lr-decay-style", "linear")
    if style.lower() not in ("constant", "linear", "cosine", "wsd"):
        given.note(f"--lr-decay-style {style}: it can be constant, linear, cosine or WSD, and is constant")
        style = "constant"
    given["optimizer.decay"] = style.lower()
    decay = _in_steps(given, "lr-decay") or steps
    if decay != steps and style != "constant":
        given.note(f"--lr-decay-iters {decay}: the learning rate decays until the last of the {steps} steps")
    fraction = given.value("lr-warmup-fraction", float)
    given["optimizer.warmup"] = (_in_steps(given, "lr-warmup") if fraction is None else fraction * decay) / steps
    if style.lower() == "wsd":
        given["optimizer.cooldown"] = _in_steps(given, "lr-wsd-decay") / steps
        if (form := given.text("lr-wsd-decay-style", "exponential")) != "linear":
            given.note(f"--lr-wsd-decay-style {form} (if not given, Megatron's default): the decay is linear")


def _in_steps(given: _Given, name: str) -> int:
    """A length that Megatron takes in iterations or samples; 0 if it is not given."""
    if f"{name}-samples" in given:
        return given.number(f"{name}-samples") // _global_batch(given)
    return given.number(f"{name}-iters", 0)


def _global_batch(given: _Given) -> int:
    if "global-batch-size" in given:
        return given.number("global-batch-size")
    replicas = _world_size(given) // (
        given.number("tensor-model-parallel-size", 1)
        * given.number("pipeline-model-parallel-size", 1)
        * given.number("context-parallel-size", 1)
    )
    if not replicas:
        raise ConfigError("--global-batch-size is missing: its default depends on the number of ranks")
    return given.required("micro-batch-size") * replicas


def _training(given: _Given) -> None:
    given.required("micro-batch-size")
    steps, batch = given["training.steps"], _global_batch(given)
    given["training.global_batch"] = batch
    given["training.save_every"] = given.number("save-interval", steps)
    given["training.evaluate_every"] = given.number("eval-interval", steps)
    given["data.samples"] = "packed"
    evaluations = given.number("eval-iters", 100)
    given["data.validation_samples"] = evaluations * batch if evaluations > 0 else None
    resets = [name for name in ("reset-position-ids", "reset-attention-mask") if name in given]
    given["data.reset_at_documents"] = len(resets) == 2
    if len(resets) == 1:
        given.note(f"--{resets[0]}: data.reset_at_documents resets attention and positions together")
    if "load" in given and given.text("load") != given.text("save"):
        given.note(f"--load {given.text('load')}: training.warm_start reads our own checkpoints only")
    if "wandb-project" in given:
        given["logging.wandb"] = True
        given.note("--wandb-project: set WANDB_PROJECT, WANDB_NAME and WANDB_ENTITY in the environment")


def _layout(given: _Given) -> None:
    given["parallel.expert_tensor"] = given.number("expert-tensor-parallel-size", given["parallel.tensor"] or 1)
    if (context := given.number("context-parallel-size", 1)) > 1:
        given.note(
            f"--context-parallel-size {context}: there is no context parallelism, so there will be more replicas"
        )
    if ranks := _world_size(given):
        given["parallel.world_size"] = ranks
        given["parallel.ranks_per_node"] = given.number("nproc-per-node")
    strategy = given.text("data-parallel-sharding-strategy", "optim_grads_params")
    stages = {"optim": 1, "optim_grads": 2, "optim_grads_params": 3}
    given["zero.stage"] = stages.get(strategy, 1) if "use-megatron-fsdp" in given else 1


def _world_size(given: _Given) -> int:
    """Ranks by torchrun's flags; 0 if they are not numbers."""
    sizes = [given.text("nnodes", "1"), given.text("nproc-per-node")]
    return int(sizes[0]) * int(sizes[1]) if all(size.isdigit() for size in sizes) else 0


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


def checked(settings: Mapping[str, Any]) -> None:
    """Check that a config file with these nested settings can be loaded.

    Raises:
        ConfigError: as `config.load`.
    """
    from omegaconf import OmegaConf

    from coe_megatron.config.load import resolve

    resolve(OmegaConf.create(dict(settings)))
