"""Contents of a checkpoint as Megatron shards: weights, and AdamW's states sharded like their parameters.

Megatron's format has no place for ZeRO's flat partitions, which depend on the number of ranks. So this module gathers
each parameter's master weight and moments and saves them like the parameter itself, under
`optimizer.<kind>.<key of the weight>`: experts one by one, layers along an axis. Any layout can read them.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed.checkpoint as dcp
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, apply_factory_merges, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from coe_megatron.checkpoint.host_copy import HostCopy
from coe_megatron.checkpoint.storage import OPTIMIZER, Reader, Writer, cause_of, write_for_megatron
from coe_megatron.checkpoint.tensor_index import TensorIndex
from coe_megatron.distributed.collectives import Group, all_gather, run_on_rank0
from coe_megatron.errors import ConfigError
from coe_megatron.text import shortened
from coe_megatron.zero import optimizer_states
from coe_megatron.zero.engine import Engine

Shard: TypeAlias = ShardedTensor | ShardedTensorFactory
Shards = dict[str, Shard]
RngStates = dict[str, torch.Tensor]
Tensors = dict[str, Any]
_TRACKED = "tracker."
_MAX_LINE = 500  # columns of an error


def copy_to_host(engine: Engine) -> Tensors:
    """Copy to host memory the weights and optimizer states that this rank will write; collective.

    Replicated tensors are divided among their ranks, evenly by bytes. The copy takes as much host memory as the rank
    writes: 16 bytes per parameter (14 with bf16) divided by the number of ranks that shard it. ZeRO stage 3 also needs
    device memory for the rank's full weights.
    """
    with torch.no_grad(), optimizer_states.gathered_weights(engine), _no_deprecation_warnings():
        planned = {name: _parts(shard) for name, shard in _all_shards(engine.module, _no_data)}
        _assign_writers(planned)
        host = HostCopy()
        for name, shard in _all_shards(engine.module, lambda *of: optimizer_states.read(engine, *of)):
            for target, part in zip(planned[name], _parts(shard), strict=True):
                target.data = host.copy(part.data) if is_main_replica(target.replica_id) else None
        host.finish()
        by_key, *_ = _replace_state_dict_keys_with_sharded_keys(planned, keep_only_main_replica=True)
        return mcore_to_pyt_state_dict(by_key, is_loading=False)


def write_tensors(tensors: Tensors, folder: Path, group: Group = None) -> None:
    """Write the tensors of `copy_to_host` into an empty folder, in Megatron's torch_dist format; collective.

    Every rank writes one file. Megatron's own writer forks the rank and starts a helper process that imports the
    program again. That takes seconds per save, hangs programs without a `__main__` guard, and forks processes that use
    CUDA.
    """
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    dcp.save(tensors, storage_writer=Writer(folder), planner=planner, process_group=group)
    run_on_rank0(lambda: write_for_megatron(folder), group)


def load_tensors(engine: Engine, folder: Path, kinds: Sequence[str] = optimizer_states.KINDS) -> None:
    """Load weights and optimizer states from a checkpoint of any layout; collective.

    Takes 4 bytes of host memory per parameter of this rank.

    Args:
        kinds: the optimizer states to load; with fp32 master weights only, the moments stay as they are.

    Raises:
        ConfigError: the checkpoint's tensors do not match the model, or it holds something other than tensors.
    """
    model, reader = engine.module, Reader(folder, run_on_rank0(lambda: TensorIndex.read(folder)))
    with optimizer_states.gathered_weights(engine):
        _refuse_other_model(model, reader, kinds)
        weights = _load(_weights(model), reader)
    for name, parameter in model.named_parameters():
        optimizer_states.write_weight(engine, parameter, weights.pop(name))
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys  # the rest are buffers
    assert not unknown, unknown
    for kind in kinds:
        with optimizer_states.gathered_weights(engine):
            shards = dict(_optimizer_states(model, kind, _allocate))
        loaded = _load(shards, reader)
        for name, parameter in model.named_parameters():
            optimizer_states.write(engine, parameter, kind, loaded[_state_name(kind, name)])


def load_model(model: torch.nn.Module, folder: Path) -> None:
    """Load the weights of a checkpoint of any layout into a model without DeepSpeed; collective.

    Raises:
        ConfigError: as `load_tensors`.
    """
    reader = Reader(folder, run_on_rank0(lambda: TensorIndex.read(folder)))
    _refuse_other_model(model, reader, ())
    with torch.no_grad():
        unknown = model.load_state_dict(_load(_weights(model), reader), strict=False).unexpected_keys
    assert not unknown, unknown


def main_parts(model: torch.nn.Module) -> list[ShardedTensor]:
    """The parts of weights and buffers that this rank has and no earlier one; of all ranks together the model, once."""
    return [part for part in stored_parts(model) if is_main_replica(part.replica_id)]


def stored_parts(model: torch.nn.Module) -> list[ShardedTensor]:
    """All parts of weights and buffers that this rank has, also those that other ranks have too."""
    return [part for shard in _weights(model).values() for part in _parts(shard)]


def rng_states() -> RngStates:
    """The RNG states of this rank: torch's on CPU and, if present, CUDA, and those of Megatron's tracker."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states | {_TRACKED + name: state for name, state in get_cuda_rng_tracker().get_states().items()}


def set_rng_states(states: RngStates) -> None:
    """Restore the RNG states that `rng_states` returned."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    tracked = {name.removeprefix(_TRACKED): state for name, state in states.items() if name.startswith(_TRACKED)}
    get_cuda_rng_tracker().set_states(tracked)


def _weights(model: torch.nn.Module) -> Shards:
    """The model's parameters and buffers by name, without `_extra_state` objects, which are empty in these models."""
    shards = model.sharded_state_dict()  # type: ignore[operator]
    return {name: shard for name, shard in shards.items() if isinstance(shard, Shard)}


Value = Callable[[torch.nn.Parameter, str], torch.Tensor]


def _all_shards(model: torch.nn.Module, value: Value) -> Iterator[tuple[str, Shard]]:
    """All shards of a checkpoint: weights, then each kind of optimizer state."""
    yield from _weights(model).items()
    for kind in optimizer_states.KINDS:
        yield from _optimizer_states(model, kind, value)


def _optimizer_states(model: torch.nn.Module, kind: str, value: Value) -> Iterator[tuple[str, Shard]]:
    """One kind of optimizer state of all parameters, with `value(parameter, kind)` as data."""
    shards = _weights(model)
    for name, parameter in model.named_parameters():
        yield _state_name(kind, name), _with_data(shards[name], kind, value(parameter, kind))


def _state_name(kind: str, name: str) -> str:
    return f"{OPTIMIZER}{kind}.{name}"


def _with_data(shard: Shard, kind: str, data: torch.Tensor) -> Shard:
    changes: dict[str, Any] = {"key": _state_name(kind, shard.key), "data": data}
    if isinstance(shard, ShardedTensor):
        changes["dtype"] = data.dtype
    return replace(shard, **changes)


def _no_data(parameter: torch.nn.Parameter, _kind: str) -> torch.Tensor:
    """A tensor of the state's shape that takes no memory."""
    return torch.zeros(()).expand(parameter.shape)


def _parts(shard: Shard) -> list[ShardedTensor]:
    """The stored parts of a parameter: experts one by one."""
    return [shard] if isinstance(shard, ShardedTensor) else list(nested_values(shard.build()))


def _assign_writers(planned: dict[str, list[ShardedTensor]]) -> None:
    """Assign each part to one of the ranks that hold it: the one with the least to write so far."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    distribution = determine_main_replica_uniform_distribution(planned, group)
    distribute_main_replicas_with_precomputed_distribution(planned, group, distribution)
    validate_sharding_integrity(determine_global_metadata(planned)[1])


def _refuse_other_model(model: torch.nn.Module, reader: Reader, kinds: Sequence[str]) -> None:
    """Compare names and sizes; Megatron's own message is a page long and does not mention surplus tensors."""
    read = tuple(_state_name(kind, "") for kind in kinds)
    stored = {
        key: list(entry.size)
        for key, entry in reader.entries.items()
        if key.startswith(read) or not key.startswith(OPTIMIZER)
    }
    shards = list(_weights(model).values())
    for kind in kinds:
        shards += [shard for _, shard in _optimizer_states(model, kind, _no_data)]
    wanted = dict(all_gather([(part.key, list(part.global_shape)) for shard in shards for part in _parts(shard)]))
    for key in sorted(stored.keys() | wanted.keys()):
        if stored.get(key) != wanted.get(key):
            sizes = f"{stored.get(key, 'missing')} in the checkpoint and {wanted.get(key, 'missing')} in the model"
            raise ConfigError(f"checkpoint {reader.folder.parent} is of another model: {key} is {sizes}")


def _allocate(parameter: torch.nn.Parameter, _kind: str) -> torch.Tensor:
    return torch.empty(parameter.shape, dtype=torch.float32)


def _load(shards: Shards, reader: Reader) -> dict[str, torch.Tensor]:
    """Does what `dist_checkpointing.load` does, but unpickles only through `Reader`."""
    with _no_deprecation_warnings():
        stored, _, factories = load_preprocess(shards)
        by_key, *names = _replace_state_dict_keys_with_sharded_keys(stored)
        tensors = mcore_to_pyt_state_dict(by_key, is_loading=True)
        planner = MCoreLoadPlanner(shapes_validation_sharded_tensors=list(nested_values(stored)))
        try:
            dcp.load(tensors, storage_reader=reader, planner=planner)
        except CheckpointException as error:  # its text has a traceback of every rank
            if not isinstance(cause := cause_of(error), ConfigError | OSError):
                raise cause from error
            message = f"checkpoint {reader.folder.parent} cannot be read: {shortened(str(cause), _MAX_LINE)}"
            raise ConfigError(message) from error
        parts = {key: _unwrap_pyt_sharded_tensor(tensor) for key, tensor in tensors.items()}
        return apply_factory_merges(_replace_sharded_keys_with_state_dict_keys(parts, *names), factories)


@contextmanager
def _no_deprecation_warnings() -> Iterator[None]:
    """Hide torch's deprecation warnings about calls that Megatron-Core 0.16 makes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
