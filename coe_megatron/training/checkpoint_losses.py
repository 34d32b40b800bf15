"""Losses of a checkpoint on named sets, on any layout: the model of training, without DeepSpeed and optimizer states.

A rank needs memory for its weights and a micro-batch, and host memory for its shard of a set: 29 bytes per token, with
`data.reset_at_documents` also `model.seq_length` bytes per token.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from coe_megatron.checkpoint import sharding
from coe_megatron.config import RunConfig
from coe_megatron.convert.answers import run_templates
from coe_megatron.convert.source import Source
from coe_megatron.convert.weights import Weights
from coe_megatron.data.datasets import PreparedData, validation_batches
from coe_megatron.data.manifest import Split
from coe_megatron.data.prepare import prepare
from coe_megatron.data.prepare_settings import TEXT_TEMPLATE, PrepareSettings
from coe_megatron.data.records import InputError
from coe_megatron.distributed.collectives import is_rank0, run_on_rank0
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.dispatch import resolved
from coe_megatron.files import remove
from coe_megatron.model.build import build_model
from coe_megatron.model.layer import coe_layers
from coe_megatron.training.data_shard import data_shard, shared
from coe_megatron.training.evaluation import SetLoss, ValidationSet, set_losses


@dataclass(frozen=True)
class DataSet:
    """A set to evaluate on: prepared data, or a file of text that `data.sources` reads.

    Attributes:
        split: of prepared data.
    """

    name: str
    path: Path
    split: Split = "valid"


@dataclass(frozen=True)
class TextSettings:
    """How files become documents, as in preparation.

    Attributes:
        template: of documents; empty for those of the run's data.
        skip_malformed: leave out malformed records.
    """

    template: tuple[str, ...] = ()
    skip_malformed: bool = False


def checkpoint_losses(
    config: RunConfig, source: Source, sets: Sequence[DataSet], samples: int | None, text: TextSettings, folder: Path
) -> dict[str, SetLoss]:
    """The loss of a checkpoint on each set; collective, after Megatron's groups exist.

    Args:
        config: of the run, with the layout and the micro-batch of these ranks.
        samples: the first so many of each set; None for all.
        folder: for temporary files, from `common_folder`.

    Raises:
        ConfigError: the checkpoint or a set cannot be used.
    """
    model = open_training_model(config, source)
    found: dict[str, SetLoss] = {}
    for each in sets:
        data = run_on_rank0(partial(_open, each, source, folder, text))
        found |= set_losses(model, {each.name: _validation_set(config, data, each.split, samples, folder)})
    return found


def open_training_model(config: RunConfig, source: Source) -> torch.nn.Module:
    """This rank's part of the model of training, with the weights of a checkpoint.

    With `chain.gating` fixed in the config alone the routers of later iterations are there, and not used.
    """
    weights = Weights(source.checkpoint)
    vocab = weights.shape(weights.place("embedding.word_embeddings.weight"))[0]
    trained = replace(config, chain=replace(config.chain, gating=source.config.chain.gating))
    model = build_model(resolved(trained, vocab, torch.distributed.get_world_size()).config, vocab)
    sharding.load_model(model, source.checkpoint / "tensors")
    for layer in coe_layers(model):
        layer.chain = replace(layer.chain, gating=config.chain.gating)
    return model


def _validation_set(
    config: RunConfig, data: PreparedData, split: Split, limit: int | None, folder: Path
) -> ValidationSet:
    """This rank's shard of a set, made of documents as in training."""
    settings, training = config.data, config.training
    samples = data.samples(
        settings.samples,
        split,
        config.model.seq_length,
        seed=training.order_seed,
        cache_dir=folder / "index",
        reset_at_documents=settings.reset_at_documents,
        answer_tokens=settings.answer_tokens,
    )
    batches = list(validation_batches(shared(samples), training.micro_batch, **data_shard(), limit=limit))
    return ValidationSet(batches, data.manifest.splits[split].bytes_per_token)


def _open(each: DataSet, source: Source, folder: Path, text: TextSettings) -> PreparedData:
    """Prepared data, or a file that is prepared now."""
    is_folder = each.path.is_dir()
    data = PreparedData.open(each.path if is_folder else _prepared(each, source, folder, text), f"--data {each.name}")
    if source.tokenizer_sha256 not in (None, data.tokenizer.sha256):
        raise ConfigError(f"--data {each.name}: {each.path} has another tokenizer than {source.checkpoint}")
    return data


def _prepared(each: DataSet, source: Source, folder: Path, text: TextSettings) -> Path:
    """Prepare a file as a validation split. The training split, which nobody reads, must have a document too."""
    if source.tokenizer is None:
        raise ConfigError(f"{source.run} has no tokenizer: name its file with --tokenizer")
    usual = [template.text for template in run_templates(source.config).choices]
    templates = text.template or tuple(dict.fromkeys([*usual, TEXT_TEMPLATE]))
    place = Path(tempfile.mkdtemp(dir=folder))
    output, unread = place / "prepared", place / "unread.jsonl"
    settings = PrepareSettings(
        output,
        (unread,),
        tokenizer=source.tokenizer,
        template=templates,
        valid_inputs=(each.path,),
        skip_malformed=text.skip_malformed,
    )
    unread.write_text(json.dumps(dict.fromkeys(settings.templates.choices[0].fields, "-")))
    try:
        prepare(settings)
    except InputError as error:
        raise ConfigError(str(error)) from None
    return output


@contextmanager
def common_folder(run: Path, single_node: bool) -> Iterator[Path]:
    """A folder for temporary files that all ranks see: if they are on several nodes, in the folder of the run.

    Raises:
        OSError: it cannot be created.
    """
    folder = run_on_rank0(lambda: Path(tempfile.mkdtemp(prefix="evaluate-", dir=None if single_node else run)))
    try:
        yield folder
    finally:
        if is_rank0():
            remove(folder, ignore_errors=True)
