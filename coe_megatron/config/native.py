"""DeepSpeed's own JSON (`zero.deepspeed`), merged over the config that our settings give. Does not import torch."""

from pathlib import Path
from typing import Any

from coe_megatron.config.zero_sizes import sizes_problem
from coe_megatron.errors import ConfigError
from coe_megatron.files import read_limited
from coe_megatron.parsing import CONFIG_BYTES, parse_json

# Keys that a setting decides: set in the JSON too, they could contradict the layout or the batch.
_DECIDED = {
    "train_batch_size": "training.global_batch",
    "train_micro_batch_size_per_gpu": "training.micro_batch",
    "gradient_accumulation_steps": "training.global_batch",
    "managed_gradient_accumulation": "training.global_batch",
    "tensor_parallel": "parallel.tensor",
    "sequence_parallel_size": "parallel.tensor",
    "expert_parallel": "parallel.expert",
    "pipeline": "parallel.pipeline",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer",
    "scheduler": "optimizer.decay",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "data_types": "training.precision",
    "communication_data_type": "training.precision",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.offload_optimizer.device": "zero.offload_optimizer",
    "zero_optimization.offload_param.device": "zero.offload_parameters",
    "zero_optimization.cpu_offload": "zero.offload_optimizer",
    "zero_optimization.cpu_offload_params": "zero.offload_parameters",
    "zero_optimization.cpu_offload_param": "zero.offload_parameters",
    "zero_optimization.zero_hpz_partition_size": "zero.stage",
    "zero_optimization.mics_shard_size": "zero.stage",
    "zero_force_ds_cpu_optimizer": "optimizer",
}


def read_native(path: str) -> dict[str, Any]:
    """Read the JSON object of a file.

    Raises:
        ConfigError: it cannot be read, or sets what one of our settings decides; one line that names both.
    """
    content = read_limited(Path(path), "zero.deepspeed", CONFIG_BYTES)
    try:
        native = parse_json(content)
    except ValueError as error:
        raise ConfigError(f"zero.deepspeed is {path}: not valid JSON ({error})") from error
    if not isinstance(native, dict):
        raise ConfigError(f"zero.deepspeed is {path}: it must hold a JSON object")
    for key, setting in _DECIDED.items():
        if _holds(native, key.split(".")):
            raise ConfigError(f"zero.deepspeed is {path}: it sets {key}, which {setting} decides; remove it")
    if problem := sizes_problem(native):
        raise ConfigError(f"zero.deepspeed is {path}: {problem}")
    return native


def merged(ours: dict[str, Any], native: dict[str, Any]) -> dict[str, Any]:
    """Merge `native` over `ours`, recursively."""
    inner = {key: merged(ours[key], value) for key, value in native.items() if _both_objects(ours.get(key), value)}
    return {**ours, **native, **inner}


def _both_objects(left: object, right: object) -> bool:
    return isinstance(left, dict) and isinstance(right, dict)


def _holds(values: Any, path: list[str]) -> bool:
    if not path:
        return True
    return isinstance(values, dict) and path[0] in values and _holds(values[path[0]], path[1:])
