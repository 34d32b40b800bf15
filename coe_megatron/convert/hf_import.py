"""From a Hugging Face model to a checkpoint that any layout trains on from.

Needs neither a model nor a GPU. One tensor of a layer, or one expert's, is in memory at a time.
"""

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

from coe_megatron import extras
from coe_megatron.checkpoint import storage, tools
from coe_megatron.checkpoint.metadata import METADATA, CheckpointMetadata, SavedLayout
from coe_megatron.checkpoint.names import name_of
from coe_megatron.checkpoint.storage import MASTER
from coe_megatron.config import RunConfig, dump
from coe_megatron.convert import foreign
from coe_megatron.convert.architecture import Architecture, Values, all_rules, is_stacked
from coe_megatron.convert.coe_architecture import COE
from coe_megatron.convert.folders import new_folder
from coe_megatron.convert.native_architectures import NATIVE
from coe_megatron.convert.rules import Constant, Rule
from coe_megatron.data.manifest import TOKENIZER, TOKENIZER_CONFIG, TOKENIZERS
from coe_megatron.data.tokenizer import Tokenizer
from coe_megatron.errors import ConfigError
from coe_megatron.files import require_file, require_folder, write_atomically
from coe_megatron.parsing import parse_json
from coe_megatron.run.output_check import CHECKPOINTS, CONFIG


class Tensors:
    """The tensors of a folder's safetensors files, read one by one.

    Raises:
        ConfigError: there are none, or a file cannot be read.
    """

    def __init__(self, folder: Path, open_files: ExitStack) -> None:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ConfigError(f"{folder} has no *.safetensors: other formats of weights are not read")
        safe_open = extras.require("safetensors").safe_open
        self._files: dict[str, Any] = {}
        for path in files:
            try:
                file = open_files.enter_context(safe_open(path, framework="pt"))
            except Exception as error:  # of the library's own kind
                raise ConfigError(f"{path} is not a safetensors file: {error}") from error
            self._files |= dict.fromkeys(file.keys(), file)

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises:
            ConfigError: there is no such tensor.
        """
        if name not in self._files:
            raise ConfigError(f"the model has no tensor {name}")
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor."""
        return self._files[name].get_tensor(name)


@dataclass(frozen=True)
class Part:
    """A part of a tensor of ours: where it is in it, and from which of theirs it is made."""

    rule: Rule
    theirs: tuple[str, ...]
    index: tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """A tensor of ours.

    Attributes:
        shape: complete, with the axes of layers and experts.
        parts: by their place along these axes.
        is_parameter: False for a buffer, which has no master and is always fp32.
    """

    shape: tuple[int, ...]
    parts: dict[tuple[int, ...], Part]
    is_parameter: bool


def import_model(
    folder: Path, out: Path, overwrite: bool = False, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Write a Hugging Face model as the folder of a run: config.yaml, a checkpoint of weights, the tokenizer.

    A run starts from it with `training.warm_start`.

    Raises:
        ConfigError: the model is of an unknown architecture, has something that our models cannot represent, or cannot
            be read; or `out` exists.
        OSError: `out` cannot be written.
    """
    values = _values(require_folder(folder, "HF_DIR"))
    config = replace(foreign.run_config(values), output=str(out))
    architecture = next(each for each in (*NATIVE, COE) if each.name == values["model_type"])
    with ExitStack() as files:
        tensors = Tensors(folder, files)
        targets = _targets(tensors, config, architecture, say)
        with new_folder(out, overwrite, CONFIG, folder) as made:
            identity = _import_tokenizer(folder, made, values.get("coe_tokenizer_sha256"), say)
            _write(made / CHECKPOINTS / name_of(0), targets, tensors, config, identity)
            write_atomically(made / CONFIG, dump(config))
    say(f"train on from it: {out / CONFIG} training.warm_start={out} output=... data.path=...")
    return out


def _values(folder: Path) -> Values:
    """The model's configuration, with the defaults of its architecture."""
    path = require_file(folder / "config.json", "config.json")
    try:
        given = parse_json(path.read_bytes())
        kind = given["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not the configuration of a model: {error}") from error
    if kind == COE.name:
        extras.require("transformers")
        from coe_megatron.convert.hf_files.configuration_coe import CoEConfig

        return CoEConfig(**{name: value for name, value in given.items() if name != "auto_map"}).to_dict()
    auto = extras.require("transformers").AutoConfig
    try:
        found = auto.from_pretrained(folder).to_dict()
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read by transformers: {error}") from error
    return {**found, **{name: value for name, value in given.items() if name not in found}}


def _targets(
    tensors: Tensors, config: RunConfig, architecture: Architecture, say: Callable[[str], None]
) -> dict[str, Target]:
    """All tensors of ours.

    Raises:
        ConfigError: the model lacks a tensor, or has one that ours has no place for.
    """
    targets: dict[str, Target] = {}
    used: set[str] = set()
    stacked, layers = is_stacked(config), config.model.num_layers
    for prefix, layer, rule in all_rules(config, architecture):
        if isinstance(rule, Constant):
            _require_constant(tensors, prefix + rule.theirs, rule)
            used.add(prefix + rule.theirs)
            continue
        at = () if layer is None or not stacked else (layer,)
        place = "" if layer is None else "decoder.layers." if stacked else f"decoder.layers.{layer}."
        sizes = () if layer is None or not stacked else (layers,)
        for expert in range(rule.experts) or (None,):
            names = tuple(prefix + name.format(e=expert) for name in rule.theirs)
            used |= set(names)
            index = at if expert is None else (*at, expert)
            axes = sizes if expert is None else (*sizes, rule.experts)
            shape = rule.merge([torch.empty(tensors.shape(name), device="meta") for name in names]).shape
            target = targets.setdefault(
                place + rule.ours, Target((*axes, *shape), {}, not rule.ours.endswith("expert_bias"))
            )
            if target.shape != (*axes, *shape):
                raise ConfigError(f"{names[0]} has another shape than that of other layers or experts")
            target.parts[index] = Part(rule, names, index)
    _refuse_unused(tensors.names() - used, config, say)
    return targets


def _require_constant(tensors: Tensors, name: str, rule: Constant) -> None:
    if name in tensors.names() and not torch.equal(tensors.read(name).float(), rule.make()):
        raise ConfigError(f"{name} is not {rule.value}: our models cannot represent it")


def _refuse_unused(names: set[str], config: RunConfig, say: Callable[[str], None]) -> None:
    """Layers after the last predict further tokens, and are left out; any other tensor would be lost."""
    later = {name for name in names if name.startswith(f"model.layers.{config.model.num_layers}.")}
    if later:
        say("left out: the layers that predict further tokens (MTP)")
    tied = set() if config.model.untied_embeddings else {"lm_head.weight"}
    if left := sorted(name for name in names - later - tied if not name.endswith("rotary_emb.inv_freq")):
        raise ConfigError(f"{left[0]} ({len(left)} such tensors): our models cannot represent it")


def _write(
    checkpoint: Path, targets: dict[str, Target], tensors: Tensors, config: RunConfig, tokenizer: str | None
) -> None:
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    entries: dict[str, TensorStorageMetadata] = {}
    for key, target in targets.items():
        entries[key] = _entry(target, dtype if target.is_parameter else torch.float32)
        if target.is_parameter:
            entries[MASTER + key] = _entry(target, torch.float32)

    def make(key: str, chunk: ChunkStorageMetadata) -> Tensor:
        part = targets[key.removeprefix(MASTER)].parts[tuple(chunk.offsets[: _axes(targets, key)])]
        merged = part.rule.merge([tensors.read(name) for name in part.theirs])
        return merged.to(entries[key].properties.dtype).reshape(chunk.sizes).contiguous()

    with tools.new_checkpoint(checkpoint, False, []) as folder:
        state = {"step": 0, "tokens": 0} | ({} if tokenizer is None else {"tokenizer": tokenizer})
        metadata = CheckpointMetadata(SavedLayout(1, 1, 1, 1, 1, 0), None, state)
        write_atomically(folder / METADATA, metadata.as_json())
        storage.write(folder / "tensors", entries, make)


def _axes(targets: dict[str, Target], key: str) -> int:
    """Number of axes of layers and experts."""
    return len(next(iter(targets[key.removeprefix(MASTER)].parts)))


def _entry(target: Target, dtype: torch.dtype) -> TensorStorageMetadata:
    chunks = []
    for index in sorted(target.parts):
        rest = target.shape[len(index) :]
        offsets, sizes = (*index, *(0 for _ in rest)), (*(1 for _ in index), *rest)
        chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(target.shape), chunks)


def _import_tokenizer(folder: Path, out: Path, trained_with: str | None, say: Callable[[str], None]) -> str | None:
    """Copy the tokenizer; returns its identity, None if there is none.

    Args:
        trained_with: the identity that an export of ours names.
    """
    path = next((folder / name for name in (TOKENIZER, *TOKENIZERS) if (folder / name).is_file()), None)
    if path is None:
        return trained_with
    try:
        found = Tokenizer(path)
    except ConfigError as error:
        say(f"the tokenizer is left out: {error}")
        return trained_with
    if trained_with in (None, found.sha256):
        shutil.copyfile(path, out / path.name)
        if found.config is not None:
            write_atomically(out / TOKENIZER_CONFIG, found.config)
    return trained_with or found.sha256
