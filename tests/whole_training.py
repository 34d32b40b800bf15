"""What some steps of training came to, written whole whatever the layout, to compare it with other layouts."""

import json
from pathlib import Path
from typing import Any

import torch
from engine_build import Named, Trace
from model_build import errors
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from coe_megatron.checkpoint import save_load as store
from coe_megatron.zero import optimizer_states as states


def write(engine: Any, trace: Trace, folder: Path) -> None:
    """A checkpoint with the weights in the end and, where the first moments were, the gradients of the first step."""
    shapes = {}
    with states.gathered_weights(engine):
        shapes = {name: parameter.shape for name, parameter in engine.module.named_parameters()}
    for name, parameter in engine.module.named_parameters():
        assert trace.gradients[name].shape == shapes[name], name
        states.write(engine, parameter, "exp_avg", trace.gradients[name])
    numbers = {"norms": trace.norms, "losses": trace.losses}
    store.save(folder, len(trace.losses), engine, numbers, keep=1)


def read(folder: Path) -> tuple[dict[str, Named], dict[str, list[float]]]:
    """What `write` wrote, whole: gradients and weights by Megatron's keys, and the numbers."""
    (checkpoint,) = folder.glob("step-*")
    reader = FileSystemReader(checkpoint / "tensors")
    kinds = {"gradients": "optimizer.exp_avg.", "weights": "optimizer.fp32_param."}
    stored = reader.read_metadata().state_dict_metadata
    wanted = [key for key in stored if key.startswith(tuple(kinds.values()))]
    whole = {key: torch.empty(stored[key].size) for key in wanted}
    dcp.load(whole, storage_reader=reader, no_dist=True)
    found = {kind: {k: v for k, v in whole.items() if k.startswith(prefix)} for kind, prefix in kinds.items()}
    return found, json.loads((checkpoint / "state.json").read_text())["state"]


def worst_deviations(folder: Path, alone: Path, norms: int | None = None) -> dict[str, float]:
    """By kind the worst deviation from one process, relative to the value, or to a tensor's largest.

    Args:
        norms: compare the norms of so many first steps; None for all.
    """
    (found, numbers), (truth, true_numbers) = read(folder), read(alone)
    numbers["norms"], true_numbers["norms"] = numbers["norms"][:norms], true_numbers["norms"][:norms]
    worst = {kind: max(errors(found[kind], truth[kind]).values()) for kind in truth}
    for kind, values in true_numbers.items():
        worst[kind] = max(abs(mine - his) / his for mine, his in zip(numbers[kind], values, strict=True))
    return worst
