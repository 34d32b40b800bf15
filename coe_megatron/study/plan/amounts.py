"""Totals of a run that a budget can hold equal: FLOPs, parameters, memory, seconds.

Seconds are estimated from FLOPs. Loading an expert's weights takes as long as computing `half_rows` rows with them. A
chain pays this C times: it computes K rows per token in each iteration, where a MoE computes C·K rows at once.
Communication and pipeline bubbles are not included.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from coe_megatron.checkpoint.names import CheckpointName
from coe_megatron.config import RunConfig
from coe_megatron.data.indexed_prefix import IndexedPrefix
from coe_megatron.data.manifest import Manifest
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.activations import extra_flops
from coe_megatron.estimate.closed_forms import Flops, parameters, training_flops
from coe_megatron.estimate.devices import Device
from coe_megatron.estimate.dispatch import resolved
from coe_megatron.estimate.run_estimate import estimate, vocabulary
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.estimate.run_time import RunSeconds, checkpoints, evaluations, validation_samples
from coe_megatron.study.plan.study_file import Quantity


@dataclass(frozen=True)
class Speed:
    """Speed of a run.

    Attributes:
        rate: FLOP/s of a rank in large matrix products.
        half_rows: see `estimate.devices.Device`.
        startup: seconds until the first evaluation.
        saving: seconds per checkpoint.
    """

    rate: float
    half_rows: float
    startup: float = 0.0
    saving: float = 0.0

    @classmethod
    def of(cls, device: Device) -> "Speed":
        """The speed in the table of devices, with no time for start-up and checkpoints."""
        return cls(device.rate, device.half_rows)


@dataclass
class Amounts:
    """Computes totals of runs; caches what it reads of prepared data.

    Attributes:
        speed: needed for seconds; None if unknown.
    """

    speed: Speed | None = None
    _vocabularies: dict[tuple[str, int | None, int], int] = field(default_factory=dict)
    _validation: dict[str, Manifest | IndexedPrefix | None] = field(default_factory=dict)

    def run(self, config: RunConfig) -> "RunTotals":
        """The totals of the run of a config.

        Raises:
            ConfigError: as `estimate.run_estimate.vocabulary` and `estimate.dispatch.resolved`.
        """
        return RunTotals(self, resolved(config, self._vocabulary(config)))

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
    def evaluations(self) -> int:
        """Number of evaluations, as `estimate.run_time.evaluations`."""
        return evaluations(self.shape.config.training)

    @property
    def tokens_per_evaluation(self) -> int:
        """Tokens per evaluation, including padding."""
        return self.amounts.validation_samples(self.shape.config) * self.shape.config.model.seq_length

    @property
    def checkpoints(self) -> int:
        """Number of checkpoints, as `estimate.run_time.checkpoints`."""
        return checkpoints(self.shape.config.training)

    @property
    def seconds(self) -> RunSeconds:
        """Predicted seconds.

        Raises:
            ConfigError: the speed is unknown.
        """
        speed = self.amounts.speed
        if speed is None:
            raise ConfigError("wall_clock requires a device: name it in the study file (device) or with --device")
        seconds_per_token = self.weighted_flops(speed.half_rows) / speed.rate / self.shape.layout.world_size
        training = self.shape.config.training
        trunk = CheckpointName.parse(Path(training.branch_from or "").name)
        share = 1 - trunk.step / training.steps if trunk else 1.0  # earlier steps are those of another run
        return RunSeconds(
            startup=speed.startup,
            steps=share * self.tokens * seconds_per_token,
            evaluations=self.evaluations * self.tokens_per_evaluation * seconds_per_token / 3,
            checkpoints=self.checkpoints * speed.saving,
        )

    def weighted_flops(self, half_rows: float) -> float:
        """Training FLOPs per token with recomputation; routed experts cost more the fewer rows they have."""
        model, config, flops = self.shape.model, self.shape.config, self.flops_per_token
        positions = config.training.micro_batch * model.seq_length
        positions *= config.parallel.expert * config.parallel.expert_tensor
        rows = positions / config.parallel.tensor / config.parallel.context * model.topk / model.experts
        return flops.total + extra_flops(model, config.moe.recompute) + flops.experts * half_rows / rows
