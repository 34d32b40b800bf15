"""This rank's shard of a run's data: the batches of each step, and the validation sets."""

from dataclasses import dataclass
from pathlib import Path

from megatron.core import parallel_state

from coe_megatron.config import RunConfig
from coe_megatron.data.datasets import StepBatches, validation_batches
from coe_megatron.data.run_data import RunData
from coe_megatron.data.samples import SampleSource
from coe_megatron.sequence_parts import PartOfSamples
from coe_megatron.training.evaluation import ValidationSet


@dataclass(frozen=True)
class DataShard:
    """The training and validation data of one model replica; all its ranks have the same, or parts of the sequences.

    Attributes:
        batches: batches of the training split, by step.
        validation: validation sets by name, in memory.
        truncated_fraction: fraction of training documents that are truncated.
    """

    batches: StepBatches
    validation: dict[str, ValidationSet]
    truncated_fraction: float


def open_data_shard(config: RunConfig, data: RunData, index: Path) -> DataShard:
    """Open this rank's shard of all splits.

    Args:
        index: folder of the index of packed samples.
    """
    training, length = config.training, config.model.seq_length
    shard = data_shard()
    batches = StepBatches(
        [shared(samples) for samples in data.training_samples(length, seed=training.order_seed, cache_dir=index)],
        data.weights,
        seed=training.order_seed,
        global_batch=training.global_batch,
        micro_batch=training.micro_batch,
        **shard,
    )
    limit = config.data.validation_samples
    validation = {
        name: ValidationSet(
            list(validation_batches(shared(samples), training.micro_batch, **shard, limit=limit)),
            data.validation[name].summary("valid").bytes_per_token,
        )
        for name, samples in data.validation_samples(length, seed=training.order_seed, cache_dir=index).items()
    }
    return DataShard(batches, validation, data.truncated_fraction(length))


def data_shard() -> dict[str, int]:
    """Which samples this rank takes, for `data.datasets`: `dp_rank` of `dp_size`."""
    return {
        "dp_rank": parallel_state.get_data_parallel_rank(),
        "dp_size": parallel_state.get_data_parallel_world_size(),
    }


def shared(samples: SampleSource) -> SampleSource:
    """Samples of which this rank has its part of the sequence under context parallelism; otherwise as they are."""
    group = parallel_state.get_context_parallel_group()
    return samples if group.size() == 1 else PartOfSamples(samples, group.rank(), group.size())
