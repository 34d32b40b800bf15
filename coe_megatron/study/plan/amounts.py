"""Totals of a run that a budget can hold equal: FLOPs, parameters, memory, seconds.

Seconds are estimated from FLOPs. Loading an expert's weights takes as long as computing `half_rows` rows with them. A
chain pays this C times: it computes K rows per token in each iteration, where a MoE computes C·K rows at once.
Communication and pipeline bubbles are not included.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from coe_megatron.config import RunConfig
from coe_megatron.config.layout import layout
from coe_megatron.data.folders import validation_paths
from coe_megatron.data.manifest import Manifest
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.activations import extra_flops
from coe_megatron.estimate.closed_forms import Flops, ModelShape, parameters, training_flops
from coe_megatron.estimate.devices import Device
from coe_megatron.estimate.run_estimate import estimate, vocabulary
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.files import kind_of
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


@dataclass(frozen=True)
class Seconds:
    """Seconds of a whole run, by purpose."""

    startup: float
    steps: float
    evaluations: float
    checkpoints: float

    @property
    def total(self) -> float:
        """Total seconds."""
        return self.startup + self.steps + self.evaluations + self.checkpoints


@dataclass
class Amounts:
    """Computes totals of configs; caches what it reads of prepared data.

    Attributes:
        speed: needed for seconds; None if unknown.
    """

    speed: Speed | None = None
    _vocabularies: dict[tuple[str, int | None, int], int] = field(default_factory=dict)
    _validation: dict[str, Manifest | None] = field(default_factory=dict)

    def of(self, quantity: Quantity, config: RunConfig) -> float:
        """One total of a whole run.

        Raises:
            ConfigError: seconds need a speed; or as `estimate.run_estimate.vocabulary`.
        """
        match quantity:
            case "parameters":
                return parameters(self.shape(config)).total
            case "memory":
                return estimate(self.run(config)).needed
            case "wall_clock":
                return self.seconds(config).total
            case "flops":
                return tokens(config) * self.flops(config).total
            case "expert_compute":
                flops = self.flops(config)
                return tokens(config) * (flops.experts + flops.shared)

    def run(self, config: RunConfig) -> RunShape:
        """The run that a config makes."""
        return RunShape.of(config, self._vocabulary(config))

    def shape(self, config: RunConfig) -> ModelShape:
        """Shape of the run's model."""
        return self.run(config).model

    def flops(self, config: RunConfig) -> Flops:
        """FLOPs per token, forward and backward, without recomputation."""
        return training_flops(self.shape(config))

    def seconds(self, config: RunConfig) -> Seconds:
        """Predicted seconds of the run; raises as `of`."""
        if self.speed is None:
            raise ConfigError("wall_clock requires a device: name it in the study file (device) or with --device")
        speed = self.speed
        seconds_per_token = self.weighted_flops(config, speed.half_rows) / speed.rate / layout(config).world_size
        return Seconds(
            startup=speed.startup,
            steps=tokens(config) * seconds_per_token,
            evaluations=evaluations(config) * self.evaluated(config) * seconds_per_token / 3,
            checkpoints=saves(config) * speed.saving,
        )

    def weighted_flops(self, config: RunConfig, half_rows: float) -> float:
        """Training FLOPs per token with recomputation; routed experts cost more the fewer rows they have."""
        shape, flops, parallel = self.shape(config), self.flops(config), config.parallel
        positions = config.training.micro_batch * shape.seq_length * parallel.expert * parallel.expert_tensor
        rows = positions / parallel.tensor * shape.topk / shape.experts
        return flops.total + extra_flops(shape, config.moe.recompute) + flops.experts * half_rows / rows

    def evaluated(self, config: RunConfig) -> int:
        """Tokens per evaluation, padding included; if data are not prepared yet, the limit of `validation_samples`."""
        return sum(self._samples(config)) * config.model.seq_length

    def _samples(self, config: RunConfig) -> Iterator[int]:
        limit = config.data.validation_samples
        for name, path in validation_paths(config.data).items():
            if path not in self._validation:
                self._validation[path] = _manifest(Path(path), f"data.validation.{name}")
            manifest = self._validation[path]
            if manifest is None:
                yield limit or 0
                continue
            split = manifest.splits["valid"]
            samples = split.documents if config.data.samples == "row" else split.tokens // config.model.seq_length
            yield min(limit or samples, samples)

    def _vocabulary(self, config: RunConfig) -> int:
        key = (repr(config.data), config.model.vocab_size, config.model.seq_length)
        if key not in self._vocabularies:
            self._vocabularies[key] = vocabulary(config)
        return self._vocabularies[key]


def _manifest(folder: Path, name: str) -> Manifest | None:
    """The manifest of prepared data; None if the folder does not exist yet."""
    return None if kind_of(folder, name) is None else Manifest.read(folder)


def tokens(config: RunConfig) -> int:
    """Tokens of all steps of a run, padding included."""
    return config.training.steps * config.training.global_batch * config.model.seq_length


def evaluations(config: RunConfig) -> int:
    """Number of evaluations: before the first step, every `evaluate_every` steps, and after the last step."""
    return 1 + -(-config.training.steps // config.training.evaluate_every)


def saves(config: RunConfig) -> int:
    """Number of checkpoints: every `save_every` steps, at milestones, and after the last step."""
    steps, every = config.training.steps, config.training.save_every
    return -(-steps // every) + sum(step % every > 0 and step < steps for step in set(config.training.milestones))
