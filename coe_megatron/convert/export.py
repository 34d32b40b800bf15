"""From a checkpoint of any layout to a folder that Hugging Face's libraries open.

Needs neither a model nor a GPU. A shard of the export is in memory at a time.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from coe_megatron import extras
from coe_megatron.config.settings import RunConfig
from coe_megatron.convert import model_card, native_architectures
from coe_megatron.convert.architecture import Architecture, Values, all_rules, config_values
from coe_megatron.convert.coe_architecture import COE
from coe_megatron.convert.folders import new_folder
from coe_megatron.convert.rules import Constant, Rule
from coe_megatron.convert.source import Source
from coe_megatron.convert.weights import Place, Weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INDEX, SHARD = "model.safetensors.index.json", "model-{:05d}-of-{:05d}.safetensors"
_CODE = ("configuration_coe.py", "attention_coe.py", "chain_coe.py", "modeling_coe.py")


@dataclass(frozen=True)
class Item:
    """A tensor of the export: its name, its number of bytes, and how to make it with those that come with it.

    Attributes:
        names: of the tensors that `make` makes together.
        bytes: of all of them.
        make: reads and converts them.
    """

    names: tuple[str, ...]
    bytes: int
    make: Callable[[], list[Tensor]]


def items(weights: Weights, config: RunConfig, architecture: Architecture, dtype: torch.dtype | None) -> Iterator[Item]:
    """All tensors of the export, in the order of the model.

    Args:
        dtype: of the tensors that are not always fp32; None for that of the checkpoint.
    """
    for prefix, layer, rule in all_rules(config, architecture):
        if isinstance(rule, Constant):
            made = rule.make().to(dtype)
            yield Item((prefix + rule.theirs,), made.nbytes, partial(_alone, made))
            continue
        for expert in range(rule.experts) or (None,):
            place = weights.place(rule.ours, layer, expert)
            kept = weights.dtype(place) if dtype is None or "expert_bias" in place.key else dtype
            names = tuple(prefix + name.format(e=expert) for name in rule.theirs)
            size = weights.shape(place).numel() * kept.itemsize
            yield Item(names, size, partial(_read, weights, place, rule, kept))


def _alone(tensor: Tensor) -> list[Tensor]:
    return [tensor]


def _read(weights: Weights, place: Place, rule: Rule, dtype: torch.dtype) -> list[Tensor]:
    return [part.to(dtype).contiguous() for part in rule.split(weights.read(place))]


def export(
    found: Source,
    out: Path,
    architecture_name: Literal["auto", "coe"] = "auto",
    dtype: str | None = None,
    shard_bytes: int = 10**9,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write a checkpoint as a Hugging Face model.

    Args:
        architecture_name: `auto` takes one that transformers knows if the model is one, `coe` the project's own.
        dtype: of the weights (DTYPES); None for that of training.
        shard_bytes: size of a file of tensors; a larger tensor has a file of its own.
        say: takes lines about progress and about what the export does not represent.

    Raises:
        ConfigError: the model cannot be exported, or `out` exists.
        OSError: `out` cannot be written.
    """
    architecture, reasons = native_architectures.of_model(found.config)
    if architecture_name == "coe":
        architecture, reasons = COE, []
    for reason in reasons:
        say(reason)
    say(f"exports {found.checkpoint} as {architecture.name}")
    if found.config.moe.capacity_factor is not None:
        say("moe.capacity_factor is not exported: the exported model drops no tokens")
    if found.tokenizer is None:
        say("without a tokenizer, which is not where the run's data were: name it with --tokenizer")
    weights = Weights(found.checkpoint, masters=dtype == "float32")
    with new_folder(out, overwrite, "config.json", found.checkpoint) as folder:
        total = write_shards(
            list(items(weights, found.config, architecture, DTYPES[dtype] if dtype else None)), folder, shard_bytes, say
        )
        found.write_tokenizer(folder)
        special = found.special_tokens()
        vocab = weights.shape(weights.place("embedding.word_embeddings.weight"))[0]
        values = config_values(found.config, architecture, vocab, special)
        if dtype is not None:
            values["dtype"] = dtype
        if found.tokenizer_sha256:
            values["coe_tokenizer_sha256"] = found.tokenizer_sha256
        if architecture is COE:
            for name in _CODE:
                shutil.copyfile(Path(__file__).parent / "hf_files" / name, folder / name)
        _write_json(folder / "config.json", values)
        _write_json(folder / "generation_config.json", _generation(special, vocab, found.tokenizer_size))
        (folder / "README.md").write_text(model_card.card(found, architecture, total), encoding="utf-8")
    return out


def write_shards(parts: list[Item], folder: Path, shard_bytes: int, say: Callable[[str], None]) -> int:
    """Write tensors into files of at most `shard_bytes`, with their index; returns the number of parameters."""
    save_file = extras.require("safetensors.torch").save_file
    shards = _grouped(parts, shard_bytes)
    places: dict[str, str] = {}
    parameters = 0
    for number, shard in enumerate(shards, 1):
        name = SHARD.format(number, len(shards))
        tensors = {name: tensor for part in shard for name, tensor in zip(part.names, part.make(), strict=True)}
        parameters += sum(tensor.numel() for tensor in tensors.values())
        save_file(tensors, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(folder.stat().st_mode & 0o666)  # safetensors lets nobody else read it
        places |= dict.fromkeys(tensors, name)
        say(f"{number} of {len(shards)} shards")
    total = sum(part.bytes for part in parts)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return parameters


def _grouped(parts: list[Item], shard_bytes: int) -> list[list[Item]]:
    shards: list[list[Item]] = [[]]
    size = 0
    for part in parts:
        if shards[-1] and size + part.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += part.bytes
    return shards


def _generation(special: Values, vocab: int, tokens: int | None) -> Values:
    """Padded rows of the embedding are no tokens."""
    padded = list(range(tokens, vocab)) if tokens is not None else []
    return {**special, **({"suppress_tokens": padded} if padded else {})}


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
