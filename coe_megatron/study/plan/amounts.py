"""Totals of a run that a budget can hold equal: FLOPs, parameters, memory, seconds."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from coe_megatron.checkpoint.names import CheckpointName
from coe_megatron.config import RunConfig
from coe_megatron.data.indexed_prefix import IndexedPrefix
from coe_megatron.data.manifest import Manifest
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.closed_forms import Flops, parameters, training_flops
from coe_megatron.estimate.dispatch import resolved
from coe_megatron.estimate.machine import Machine
from coe_megatron.estimate.run_estimate import estimate, vocabulary
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.estimate.run_time import RunSeconds, checkpoints, run_time, validation_samples
from coe_megatron.estimate.step_time import StepTime, step_time
from coe_megatron.study.plan.study_file import Quantity


@dataclass(frozen=True)
class Speed:
    """Speed of runs.

    Attributes:
        machine: what they run on.
        factor: measured seconds of a step over predicted ones.
        startup: seconds until the first evaluation, as measured; None for the machine's.
        saving: seconds that a checkpoint stops a run, as measured; None for the machine's.
    """

    machine: Machine
    factor: float = 1.0
    startup: float | None = None
    saving: float | None = None


@dataclass
class Amounts:
    """Computes totals of runs; caches what it reads of prepared data.

    Attributes:
        speed: needed for seconds; None if unknown.
    """

    speed: Speed | None = None
    _vocabularies: dict[tuple[str, int | None, int], int] = field(default_factory=dict)
    _validation: dict[str, Manifest | IndexedPrefix | None] = field(default_factory=dict)

    def run(self, config: RunConfig, ranks: int | None = None) -> "RunTotals":
        """The totals of the run of a config.

        Args:
            ranks: if the config does not say; None for as few as its layout needs.

        Raises:
            ConfigError: as `estimate.run_estimate.vocabulary` and `estimate.dispatch.resolved`.
        """
        return RunTotals(self, resolved(config, self._vocabulary(config), ranks))

    def validation_samples(self, config: RunConfig) -> int:
        """Samples per evaluation; if data are not prepared yet, `validation_samples` per validation set."""
        return validation_samples(config, self._validation)

    def _vocabulary(self, config: RunConfig) -> int:
        key = (repr(config.data), config.model.vocab_size, config.model.seq_length)
        if key not in self._vocabularies:
            self._vocabularies[key] = vocabulary(config)
        return self._vocabularies[key]


@dataclass(frozen=True)
class RunTotals:
    """Totals of one run; `Amounts.run` creates it."""

    amounts: Amounts
    shape: RunShape

    def of(self, quantity: Quantity) -> float:
        """One total, by name; raises as `seconds`."""
        match quantity:
            case "parameters":
                return parameters(self.shape.model).total
            case "memory":
                return estimate(self.shape).needed
            case "wall_clock":
                return self.seconds.total
            case "flops":
                return self.tokens * self.flops_per_token.total
            case "expert_compute":
                return self.tokens * (self.flops_per_token.experts + self.flops_per_token.shared)

    @cached_property
    def flops_per_token(self) -> Flops:
        """FLOPs per token, forward and backward, without recomputation."""
        return training_flops(self.shape.model)

    @property
    def tokens(self) -> int:
        """Tokens of all steps, including padding."""
        training = self.shape.config.training
        return training.steps * training.global_batch * self.shape.config.model.seq_length

    @property
    def checkpoints(self) -> int:
        """Number of checkpoints, as `estimate.run_time.checkpoints`."""
        return checkpoints(self.shape.config.training)

    @property
    def seconds(self) -> RunSeconds:
        """Predicted seconds.

        Raises:
            ConfigError: the machine is unknown.
        """
        speed = self._speed
        samples = self.amounts.validation_samples(self.shape.config)
        whole = run_time(self.shape, speed.machine, self.step, samples)
        training = self.shape.config.training
        trunk = CheckpointName.parse(Path(training.branch_from or "").name)
        share = 1 - trunk.step / training.steps if trunk else 1.0  # earlier steps are those of another run
        return RunSeconds(
            startup=whole.startup if speed.startup is None else speed.startup,
            steps=share * speed.factor * whole.steps,
            evaluations=speed.factor * whole.evaluations,
            checkpoints=whole.checkpoints if speed.saving is None else self.checkpoints * speed.saving,
        )

    @cached_property
    def step(self) -> StepTime:
        """The time of a step on the machine, as predicted without measuring; raises as `seconds`."""
        return step_time(self.shape, self._speed.machine)

    @property
    def _speed(self) -> Speed:
        if self.amounts.speed is None:
            raise ConfigError("wall_clock requires a machine: name it in the study file (machine) or with --machine")
        return self.amounts.speed
