"""What a checkpoint holds, as Megatron shards: the weights, and for each parameter AdamW's states in its very sharding.

ZeRO's flat partitions have no place in Megatron's format and depend on the number of ranks. So every parameter's master
weight and moments are put together and saved like the parameter itself, under `optimizer.<kind>.<key of the weight>`:
experts one by one, layers along an axis. Any layout can read them.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from coe_megatron.checkpoint.seal import gathered
from coe_megatron.zero import states as zero_states
from coe_megatron.zero.engine import Engine

Shard: TypeAlias = ShardedTensor | ShardedTensorFactory
Shards = dict[str, Shard]
Random = dict[str, torch.Tensor]
_TRACKED, _OPTIMIZER = "tracker.", "optimizer."


def save_tensors(engine: Engine, folder: Path) -> None:
    """Write weights and optimizer states into an empty folder; collective.

    The first replica of each shard writes it. It needs 12 bytes of host memory for every parameter it writes, and with
    ZeRO stage 3 the device's memory for the rank's whole weights.
    """
    with zero_states.gathered(engine), _deprecations_unsaid():
        shards = _weights(engine.module)
        for kind in zero_states.KINDS:
            shards |= _optimizer_states(engine.module, kind, partial(_read_for_saving, engine))
        dist_checkpointing.save(shards, str(folder), _SaveInProcess("torch_dist", 1))


def load_tensors(engine: Engine, folder: Path, kinds: Sequence[str] = zero_states.KINDS) -> None:
    """Read what `save_tensors` wrote on any layout; collective. 4 bytes of host memory for each of a rank's parameters.

    Args:
        kinds: which of the optimizer's states to read; fp32 master weights alone leave the moments as they are.

    Raises:
        ValueError: the checkpoint holds other tensors than the model.
    """
    model = engine.module
    with zero_states.gathered(engine):
        _refuse_other_model(_weights(model), folder)
        weights = _load(_weights(model), folder)
    for name, parameter in model.named_parameters():
        zero_states.write_weight(engine, parameter, weights.pop(name))
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys  # what is left are buffers
    assert not unknown, unknown
    for kind in kinds:
        with zero_states.gathered(engine):
            shards = _optimizer_states(model, kind, _allocate)
        loaded = _load(shards, folder)
        for name, parameter in model.named_parameters():
            zero_states.write(engine, parameter, kind, loaded[_state_name(kind, name)])


def random_states() -> Random:
    """The states of this rank's generators: torch's on CPU and, where there is one, CUDA, and Megatron's."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states | {_TRACKED + name: state for name, state in get_cuda_rng_tracker().get_states().items()}


def set_random_states(states: Random) -> None:
    """Undo what happened to the generators since `random_states`."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    tracked = {name.removeprefix(_TRACKED): state for name, state in states.items() if name.startswith(_TRACKED)}
    get_cuda_rng_tracker().set_states(tracked)


class _SaveInProcess(TorchDistSaveShardedStrategy):
    """Megatron's torch_dist format, written by threads of this process.

    Megatron's own way forks the rank to write, and starts a helper process that imports the program again: seconds a
    save, a hang for programs without a `__main__` guard, and forks of processes that use CUDA.
    """

    def save(self, sharded_state_dict: Shards, checkpoint_dir: str | Path) -> None:
        """Write the main replica of every shard (their keys, offsets and planner are Megatron's)."""
        by_key, *_ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        dcp.save(
            mcore_to_pyt_state_dict(by_key, is_loading=False),
            storage_writer=dcp.FileSystemWriter(checkpoint_dir, thread_count=2, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def _weights(model: torch.nn.Module) -> Shards:
    """The model's parameters and buffers by name. Pickled `_extra_state` objects, empty in our models, stay out."""
    shards = model.sharded_state_dict()  # type: ignore[operator]
    return {name: shard for name, shard in shards.items() if isinstance(shard, Shard)}


def _optimizer_states(model: torch.nn.Module, kind: str, value: Callable[..., torch.Tensor]) -> Shards:
    """One kind of optimizer state of all parameters, with `value(parameter, kind, shard)` as data."""
    shards = _weights(model)
    return {
        _state_name(kind, name): _with_data(shards[name], kind, value(parameter, kind, shards[name]))
        for name, parameter in model.named_parameters()
    }


def _state_name(kind: str, name: str) -> str:
    return f"{_OPTIMIZER}{kind}.{name}"


def _with_data(shard: Shard, kind: str, data: torch.Tensor) -> Shard:
    changes: dict[str, Any] = {"key": _state_name(kind, shard.key), "data": data}
    if isinstance(shard, ShardedTensor):
        changes["dtype"] = data.dtype
    return replace(shard, **changes)


def _read_for_saving(engine: Engine, parameter: torch.nn.Parameter, kind: str, shard: Shard) -> torch.Tensor:
    """The whole state where it will be written, elsewhere something of its shape that takes no memory."""
    whole = zero_states.read(engine, parameter, kind)
    return whole.cpu() if is_main_replica(shard.replica_id) else torch.zeros(()).expand(whole.shape)


def _refuse_other_model(shards: Shards, folder: Path) -> None:
    """Compare names and sizes: Megatron's own message is a page long, and it is silent on what is left over."""
    stored = dist_checkpointing.load_tensors_metadata(str(folder))
    held = {key: list(entry.global_shape) for key, entry in stored.items() if not key.startswith(_OPTIMIZER)}
    apply_factories(shards)
    wanted = dict(gathered([(shard.key, list(shard.global_shape)) for shard in nested_values(shards)]))
    for key in sorted(held.keys() | wanted.keys()):
        if held.get(key) != wanted.get(key):
            sizes = f"{held.get(key, 'missing')} in the checkpoint and {wanted.get(key, 'missing')} in the model"
            raise ValueError(f"checkpoint {folder.parent} is of another model: {key} is {sizes}")


def _allocate(parameter: torch.nn.Parameter, _kind: str, _shard: Shard) -> torch.Tensor:
    return torch.empty(parameter.shape, dtype=torch.float32)


def _load(shards: Shards, folder: Path) -> dict[str, torch.Tensor]:
    with _deprecations_unsaid():
        return dist_checkpointing.load(shards, str(folder))


@contextmanager
def _deprecations_unsaid() -> Iterator[None]:
    """Torch warns of the calls Megatron-Core 0.16 makes; to the user of a program that says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
