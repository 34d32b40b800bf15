"""Settings from the command line of a Megatron-LM training, without Megatron-LM.

`megatron_flags.FLAGS` has the flags that are settings by themselves. The functions here put together those that depend
on each other.
"""

import difflib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from coe_megatron.config.megatron_flags import FLAGS, TORCHRUN, Value, frequency, whole
from coe_megatron.config.settings import RunConfig
from coe_megatron.errors import ConfigError
from coe_megatron.parsing import CONFIG_BYTES
from coe_megatron.text import shortened

_MAY_BE_0 = {"seed", "eval-iters", "lr-warmup-iters", "lr-warmup-samples", "moe-shared-expert-intermediate-size"}
_LONGEST = CONFIG_BYTES  # a command, with its variables replaced
_MOST_SUGGESTIONS = 100


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
    """Split a command or a shell script into arguments, with continued lines and quotes, without comments.

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
    length = 0
    for word in found:
        value = _VARIABLE.sub(lambda name: variables.get(name[1] or name[3], name[2] or name[0]), word)
        length += len(value)
        if length > _LONGEST:
            raise ConfigError(f"the command has more than {_LONGEST:,} characters, with its variables replaced")
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
        return self.value(name, whole, default)

    def value(self, name: str, read: Callable[[str], Value], default: Value = None) -> Value:
        """The value of a flag, or the default if it is not given."""
        values = self.flags.get(f"--{name}")
        if values is None:
            return default
        if not values:
            raise ConfigError(f"--{name} has no value")
        try:
            found = read(values[0])
        except ValueError:
            kind = {whole: "an integer", float: "a number", frequency: "a number or a list of 0 and 1"}[read]
            raise ConfigError(f"--{name} is {shortened(values[0])!r}: it must be {kind}") from None
        if read is whole and found < 1 and name not in _MAY_BE_0:
            raise ConfigError(f"--{name} is {found}: it must be at least 1")
        return found

    def required(self, name: str, read: Callable[[str], Value] = whole) -> Value:
        if name not in self:
            raise ConfigError(f"--{name} is missing")
        return self.value(name, read)

    def note(self, text: str) -> None:
        self.translation.notes.append(shortened(text, 400))

    def _note_unused(self, name: str, values: list[str]) -> None:
        shown = shortened(" ".join([name, *values]))
        if (flag := FLAGS.get(name)) is None:
            few = len(self.translation.notes) < _MOST_SUGGESTIONS
            near = difflib.get_close_matches(name[:80], FLAGS, n=1, cutoff=0.8) if few else []
            self.note(f"{shown}: unknown here{f'; did you mean {near[0]}?' if near else ''}")
        elif flag.note and not flag.needless:
            self.note(f"{shown}: {flag.note}")


def _flags(command: Sequence[str]) -> dict[str, list[str]]:
    """The words after each flag up to the next; of a repeated flag the last counts, as in argparse."""
    flags: dict[str, list[str]] = {}
    values: list[str] = []
    for word in command:
        closes = word.endswith(")") and "(" not in word  # an array of arguments
        word = word.removesuffix(")") if closes else word
        if re.match(r"--\w", word):
            name, given, value = word.partition("=")
            dashed = name.replace("_", "-")  # torchrun takes both
            values = flags[dashed if dashed in TORCHRUN else name] = [value] if given else []
        elif re.search(r"=\($|\[@\]|\[\*\]", word) or word in ("&&", ";", "|"):
            values = []  # an array begins or is used, or another command follows
        elif word:
            values.append(word)
        if closes:
            values = []
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
    if "num-layers-per-virtual-pipeline-stage" in given:
        layers = given.number("num-layers-per-virtual-pipeline-stage") * (given["parallel.pipeline"] or 1)
        given["parallel.virtual_pipeline"], more = divmod(given["model.num_layers"], layers)
        if more:
            given.note(f"--num-layers-per-virtual-pipeline-stage: {layers} must divide model.num_layers")
    else:
        given["parallel.virtual_pipeline"] = given.number("num-virtual-stages-per-pipeline-rank", 1)
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


def checked(settings: Mapping[str, Any]) -> None:
    """Check that a config file with these nested settings can be loaded.

    Raises:
        ConfigError: as `config.load`.
    """
    from omegaconf import OmegaConf

    from coe_megatron.config.load import resolve

    resolve(OmegaConf.create(dict(settings)))
