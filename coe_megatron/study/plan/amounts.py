"""What a run comes to as a whole: FLOPs, parameters, memory, seconds. All that a budget can hold equal.

Seconds are estimated from FLOPs. An expert's weights are read once for all its rows, so few rows take as long
as `half_rows` of them: a chain, with K rows a token and iteration instead of C·K at once, pays that C times. What ranks
send each other and a pipeline's bubble are not in it.
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
    """How fast a run is.

    Attributes:
        rate: FLOP/s of a rank in products of many rows.
        half_rows: see `estimate.devices.Device`.
        startup: seconds before the first evaluation.
        saving: seconds a checkpoint takes.
    """

    rate: float
    half_rows: float
    startup: float = 0.0
    saving: float = 0.0

    @classmethod
    def of(cls, device: Device) -> "Speed":
        """As the table has it, with nothing known of start-up and checkpoints."""
        return cls(device.rate, device.half_rows)


@dataclass(frozen=True)
class Seconds:
    """Of a whole run, by what for."""

    startup: float
    steps: float
    evaluations: float
    checkpoints: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.startup + self.steps + self.evaluations + self.checkpoints


@dataclass
class Amounts:
    """Measures configs; what it reads of prepared data it reads once.

    Attributes:
        speed: for seconds; None where nothing is known of it.
    """

    speed: Speed | None = None
    _vocabularies: dict[tuple[str, int | None, int], int] = field(default_factory=dict)
    _validation: dict[str, Manifest | None] = field(default_factory=dict)

    def of(self, quantity: Quantity, config: RunConfig) -> float:
        """One amount of a whole run.

        Raises:
            ConfigError: seconds are asked for without a speed; or of prepared data as `estimate.cost.vocabulary`.
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
        """The run's model."""
        return self.run(config).model

    def flops(self, config: RunConfig) -> Flops:
        """Of a token, forward and backward, without recomputation."""
        return training_flops(self.shape(config))

    def seconds(self, config: RunConfig) -> Seconds:
        """That the run takes; raises as `of`."""
        if self.speed is None:
            raise ConfigError("hours need a device: name it in the study file (device) or with --device")
        speed = self.speed
        a_position = self.weighted_flops(config, speed.half_rows) / speed.rate / layout(config).ranks
        return Seconds(
            startup=speed.startup,
            steps=tokens(config) * a_position,
            evaluations=evaluations(config) * self.evaluated(config) * a_position / 3,
            checkpoints=saves(config) * speed.saving,
        )

    def weighted_flops(self, config: RunConfig, half_rows: float) -> float:
        """FLOPs a position in training, recomputation among them, those of routed experts the dearer the fewer rows."""
        shape, flops, parallel = self.shape(config), self.flops(config), config.parallel
        positions = config.training.micro_batch * shape.seq_length * parallel.expert * parallel.expert_tensor
        rows = positions / parallel.tensor * shape.topk / shape.experts
        return flops.total + extra_flops(shape, config.moe.recompute) + flops.experts * half_rows / rows

    def evaluated(self, config: RunConfig) -> int:
        """Positions that an evaluation passes; where data are not prepared yet, those that a limit allows."""
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
    """Of prepared data; None where there are none yet."""
    return None if kind_of(folder, name) is None else Manifest.read(folder)


def tokens(config: RunConfig) -> int:
    """Positions of all steps of a run, padding among them."""
    return config.training.steps * config.training.global_batch * config.model.seq_length


def evaluations(config: RunConfig) -> int:
    """How often a run evaluates: before the first step, every so many steps, and after the last one."""
    return 1 + -(-config.training.steps // config.training.evaluate_every)


def saves(config: RunConfig) -> int:
    """How many checkpoints it saves: every so many steps, at milestones, and after the last one."""
    steps, every = config.training.steps, config.training.save_every
    return -(-steps // every) + sum(step % every > 0 and step < steps for step in set(config.training.milestones))
