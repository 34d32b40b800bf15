"""This rank's share of a run's data: the batches of each step, and the validation sets."""

from dataclasses import dataclass
from pathlib import Path

from megatron.core import parallel_state

from coe_megatron.config import RunConfig
from coe_megatron.data.datasets import StepBatches, validation_batches
from coe_megatron.data.run_data import RunData
from coe_megatron.training.evaluation import ValidationSet


@dataclass(frozen=True)
class Splits:
    """What one replica of the model trains and validates on; all ranks that hold it between them have the same.

    Attributes:
        batches: of the training split, by step.
        validation: by name; small, so they stay in memory.
        cut: share of the training documents that lose their end.
    """

    batches: StepBatches
    validation: dict[str, ValidationSet]
    cut: float


def open_splits(config: RunConfig, data: RunData, index: Path) -> Splits:
    """Take up this rank's share of all splits.

    Args:
        index: folder for the order of packed samples.
    """
    training, length = config.training, config.model.seq_length
    share = {
        "dp_rank": parallel_state.get_data_parallel_rank(),
        "dp_size": parallel_state.get_data_parallel_world_size(),
    }
    batches = StepBatches(
        data.training_samples(length, seed=training.seed, cache_dir=index),
        data.weights,
        seed=training.seed,
        global_batch=training.global_batch,
        micro_batch=training.micro_batch,
        **share,
    )
    limit = config.data.validation_samples
    validation = {
        name: ValidationSet(
            list(validation_batches(samples, training.micro_batch, **share, limit=limit)),
            data.validation[name].manifest.splits["valid"].bytes_per_token,
        )
        for name, samples in data.validation_samples(length, seed=training.seed, cache_dir=index).items()
    }
    return Splits(batches, validation, data.share_cut(length))
