"""Megatron's GPTDataset, and its index from windows to tokens, which rank 0 builds once for all ranks."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from coe_megatron.data.manifest import FileSummary, Split
from coe_megatron.distributed.collectives import run_on_rank0
from coe_megatron.errors import one_line
from coe_megatron.files import problem, read_limited, require_file, set_aside, write_atomically
from coe_megatron.parsing import JSON_BYTES, first_of

_LIST = "complete.json"  # lists every other file of an index with its size and SHA-256


def gpt_dataset(indexed: Any, prefix: str, split: Split, tokenizer: Any, cache: Path, options: dict[str, Any]) -> Any:
    """Megatron's GPTDataset over one epoch of a split, with its index in `cache`.

    Args:
        prefix: path of the split's files without their suffixes.
        tokenizer: its `vocab_size`, `eos_id` and `sha256`, as `Tokenizer` or `datasets.TokenizerFacts` has them.
        options: Megatron's config: the seed of the order, the sequence length, and the resets at document boundaries.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split as MegatronSplit

    config = GPTDatasetConfig(
        blend_per_split=[([prefix], None) if name.name == split else None for name in MegatronSplit],
        path_to_cache=str(cache),
        tokenizer=_TokenizerFacts(tokenizer),
        eod_mask_loss=False,
        drop_last_partial_validation_sequence=False,
        **options,
    )
    documents = np.arange(len(indexed), dtype=np.int32)
    # The dataset path is part of the index's name. We pass only the split, so that the data can be moved.
    return GPTDataset(indexed, split, documents, None, MegatronSplit[split], config)


def build_once(cache: Path, build: Callable[[Path], Any]) -> Any:
    """Build a dataset whose index is in `cache`; an interrupted build leaves no partial index behind.

    GPTDataset writes its index on rank 0 only, expects the other ranks to come later, and trusts whatever it finds.
    Therefore an index that was changed after it was built is set aside and built again.
    """
    run_on_rank0(lambda: _make_index(cache, build))
    return build(cache)


class _TokenizerFacts:
    """The attributes that GPTDataset reads from a tokenizer. No token has its pad id, so padding is unambiguous."""

    pad = -1

    def __init__(self, tokenizer: Any) -> None:
        self.vocab_size = tokenizer.vocab_size
        self.eod = self.eos = tokenizer.eos_id
        self.unique_identifiers = {"sha256": tokenizer.sha256}


def _make_index(cache: Path, build: Callable[[Path], Any]) -> None:
    try:
        if os.path.lexists(cache) and (reason := _find_damage(cache)):
            set_aside(cache, f"is damaged ({reason})")
        if not cache.exists():
            partial = cache.with_name(f"{cache.name}.{token_hex(4)}.partial")
            build(partial)
            listed = {path.name: asdict(FileSummary.of(path)) for path in sorted(partial.iterdir())}
            write_atomically(partial / _LIST, json.dumps(listed, indent=1))
            partial.rename(cache)
    except OSError as error:
        raise problem(cache, "the index of packed samples", error) from error


def _find_damage(cache: Path) -> str:
    """How an index differs from what was built; empty if it does not. Neither we nor GPTDataset unpickle a file."""
    try:
        content = read_limited(cache / _LIST, "its list of files", JSON_BYTES)
        listed = TypeAdapter(dict[str, FileSummary]).validate_json(content)
        found = {path.name: path for path in cache.iterdir() if path.name != _LIST}
        if differing := listed.keys() ^ found.keys():
            return one_line(f"{min(differing)} is missing or unexpected")
        for name, path in found.items():
            if FileSummary.of(require_file(path, name)) != listed[name]:
                return f"the content of {name} has changed"
            if path.suffix == ".npy":
                np.load(path, mmap_mode="r", allow_pickle=False)
    except ValidationError as error:
        return f"{_LIST}: {first_of(error)}"
    except (OSError, ValueError, EOFError) as error:
        return one_line(str(error))
    return ""
