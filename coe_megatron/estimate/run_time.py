"""The predicted time of a whole run on a machine: start-up, steps, evaluations, and what saving stops."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from coe_megatron.config import RunConfig
from coe_megatron.config.settings import TrainingSettings
from coe_megatron.data.folders import DataFolder, validation_paths
from coe_megatron.data.indexed_prefix import IndexedPrefix
from coe_megatron.data.manifest import Manifest
from coe_megatron.estimate.checkpoint_size import MASTER_AND_MOMENTS, checkpoint_bytes
from coe_megatron.estimate.machine import Machine
from coe_megatron.estimate.parameter_shards import parameter_shards
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.estimate.step_time import StepTime


@dataclass(frozen=True)
class RunSeconds:
    """Seconds of a run, by purpose."""

    startup: float
    steps: float
    evaluations: float
    checkpoints: float

    @property
    def total(self) -> float:
        """Total seconds."""
        return self.startup + self.steps + self.evaluations + self.checkpoints


@dataclass(frozen=True)
class SaveSeconds:
    """Of a checkpoint.

    Attributes:
        stopped: how long the run waits for it.
        written: how long it is written after that, in the background.
        loaded: how long it takes until all ranks have read what they hold.
    """

    stopped: float
    written: float
    loaded: float

    @classmethod
    def of(cls, run: RunShape, machine: Machine) -> "SaveSeconds":
        """Of a run whose checkpoints are on the machine's disk."""
        size = checkpoint_bytes(run)
        writing, copying = size / machine.disk.write, size / run.layout.world_size / machine.host.transfer
        in_background = run.config.training.background_saving
        return cls(
            stopped=copying if in_background else writing,
            written=writing if in_background else 0.0,
            loaded=_read_bytes(run) / machine.disk.read,
        )


def _read_bytes(run: RunShape) -> int:
    """Bytes that all nodes read of a checkpoint: each node all that its ranks hold, once, whatever others read."""
    layout, ranks, size = run.layout, run.ranks_on_a_node, run.element_bytes + MASTER_AND_MOMENTS
    found = 0
    for stage in range(layout.pipeline):
        shards = parameter_shards(run, stage)
        own = shards.dense * min(layout.tensor, ranks)
        own += shards.experts * min(layout.expert * layout.expert_tensor, ranks)
        found += size * own * -(-layout.world_size // layout.pipeline // ranks)
    return found


def run_time(run: RunShape, machine: Machine, step: StepTime, samples: int) -> RunSeconds:
    """The time of a run without failures.

    Args:
        step: the time of its steps.
        samples: of all validation sets in an evaluation.
    """
    training = run.config.training
    micro_batches = -(-samples // (training.micro_batch * run.layout.data))
    return RunSeconds(
        startup=machine.failures.start + machine.failures.warm_up,
        steps=training.steps * step.total,
        evaluations=evaluations(training) * (micro_batches + run.layout.pipeline - 1) * step.forward,
        checkpoints=checkpoints(training) * SaveSeconds.of(run, machine).stopped,
    )


def evaluations(training: TrainingSettings) -> int:
    """Number of evaluations: before the first step, every `evaluate_every` steps, and after the last step."""
    return 1 + -(-training.steps // training.evaluate_every)


def checkpoints(training: TrainingSettings) -> int:
    """Number of checkpoints: every `save_every` steps, at milestones, and after the last step."""
    steps, every = training.steps, training.save_every
    return -(-steps // every) + sum(step % every > 0 and step < steps for step in set(training.milestones))


def validation_samples(config: RunConfig, known: dict[str, Manifest | IndexedPrefix | None] | None = None) -> int:
    """Samples per evaluation; if data are not prepared yet, `data.validation_samples` per validation set.

    Args:
        known: what was read of prepared data before, by path; what is read now is added.
    """
    return sum(_samples(config, {} if known is None else known))


def _samples(config: RunConfig, known: dict[str, Manifest | IndexedPrefix | None]) -> Iterator[int]:
    limit = config.data.validation_samples
    for name, path in validation_paths(config.data).items():
        if path not in known:
            data = DataFolder(f"data.validation.{name}", Path(path))
            known[path] = data.read() if data.exists else None
        manifest = known[path]
        if manifest is None:
            yield limit or 0
            continue
        split = manifest.splits["valid"]
        samples = split.documents if config.data.samples == "row" else split.tokens // config.model.seq_length
        yield min(limit or samples, samples)
