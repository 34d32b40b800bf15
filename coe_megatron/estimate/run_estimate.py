"""The estimated cost of a run: parameters, FLOPs, memory and communication.

Bytes are per rank. If pipeline stages differ, memory is that of the stage with the most memory, and communication that
of the stage that sends most.
"""

from dataclasses import asdict, dataclass
from typing import Any, get_args

from coe_megatron.chain.settings import Recompute
from coe_megatron.config.layout import Layout
from coe_megatron.config.settings import RunConfig, TrainingSettings
from coe_megatron.data.folders import check_data, data_folders
from coe_megatron.errors import ConfigError
from coe_megatron.estimate import closed_forms
from coe_megatron.estimate.activations import Activations, activations, extra_flops
from coe_megatron.estimate.closed_forms import Flops, ParameterCount
from coe_megatron.estimate.dispatch import Dispatch, dispatch
from coe_megatron.estimate.machine import Machine
from coe_megatron.estimate.memory import memory
from coe_megatron.estimate.node_limit import NodeLimit, node_limit
from coe_megatron.estimate.run_shape import RunShape, padded_vocabulary
from coe_megatron.estimate.run_time import RunSeconds, checkpoints, evaluations, run_time, validation_samples
from coe_megatron.estimate.step_time import StepTime, step_time
from coe_megatron.estimate.traffic import Sent, bubble, traffic
from coe_megatron.text import aligned_facts, duration, format_duration


@dataclass(frozen=True)
class RunEstimate:
    """The cost of a run.

    Attributes:
        layout: the parallel layout.
        micro_batch: sequences per micro-batch of a rank.
        micro_batches: micro-batches per step on each replica.
        bubble: fraction of a step in which a pipeline stage is idle.
        parameters: of the complete model, by kind.
        flops_per_token: forward and backward, by kind.
        tokens_per_step: positions of a global batch, including padding.
        stage: the pipeline stage (from 0) with the most memory; memory, measured, host and activations are of this
            stage.
        memory: bytes per rank at the peak of a step, by kind (see `estimate.memory`).
        measured: bytes by the kinds that `training.memory_meter` measures, each at its own maximum.
        host: bytes per rank in host memory, with `zero.offload_...`.
        activations: bytes of a micro-batch's activations for each mode of `moe.recompute`, assuming uniform routing.
        recompute: the run's `moe.recompute`.
        extra_flops: FLOPs per token that each mode adds to `flops_per_token`.
        communication: bytes per rank and step of the stage that sends most, by purpose and link.
        dispatch: how tokens get to their experts; None without expert parallelism.
        node_limit: to how many nodes a token goes; None without a limit.
        training: settings that the number of evaluations and checkpoints follows from.
        machine, time, whole: the machine, and the predicted times of a step and of the run on it; None without one.
    """

    layout: Layout
    micro_batch: int
    micro_batches: int
    bubble: float
    parameters: ParameterCount
    flops_per_token: Flops
    tokens_per_step: int
    stage: int
    memory: dict[str, int]
    measured: dict[str, int]
    host: dict[str, int]
    recompute: Recompute
    activations: dict[str, Activations]
    extra_flops: dict[str, int]
    communication: dict[str, Sent]
    dispatch: Dispatch | None
    node_limit: NodeLimit | None
    training: TrainingSettings
    machine: Machine | None
    time: StepTime | None
    whole: RunSeconds | None

    @property
    def mfu(self) -> float | None:
        """The fraction of the machine's peak in bf16 that the step's FLOPs take; None if one of both is unknown."""
        if self.machine is None or self.time is None or self.machine.bf16.peak is None:
            return None
        flops = self.tokens_per_step * self.flops_per_token.total
        return flops / self.time.total / self.layout.world_size / self.machine.bf16.peak

    @property
    def needed(self) -> int:
        """Bytes of device memory at the peak."""
        return sum(self.memory.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values with totals, for JSON."""
        counted, flops, sent = self.parameters, self.flops_per_token, sum(self.communication.values(), Sent(0, 0))
        totals = {name: getattr(counted, name) for name in ("total", "active", "without_embeddings")}
        return {
            "layout": asdict(self.layout)
            | {
                "data": self.layout.data,
                "replicas": self.layout.replicas,
                "expert_data": self.layout.expert_data,
                "micro_batch": self.micro_batch,
                "micro_batches_per_step": self.micro_batches,
                "pipeline_bubble": self.bubble,
            },
            "parameters": totals | asdict(counted),
            "flops_per_token": {"total": flops.total} | asdict(flops),
            "tokens_per_step": self.tokens_per_step,
            "pipeline_stage_with_most_memory": self.stage,
            "memory_bytes_per_rank": {"total": self.needed} | self.memory,
            "host_memory_bytes_per_rank": {"total": sum(self.host.values())} | self.host,
            "recompute": {
                mode: {"extra_flops_per_token": self.extra_flops[mode], "peak": each.peak} | asdict(each)
                for mode, each in self.activations.items()
            },
            "communication_bytes_per_rank_and_step": {
                name: {"total": each.total} | asdict(each)
                for name, each in {"total": sent, **self.communication}.items()
            },
            "dispatch": self.dispatch and self.dispatch.as_dict(),
            "node_limit": self.node_limit and self.node_limit.as_dict(),
            "seconds_per_step": self.time and {"total": self.time.total, "mfu": self.mfu} | self.time.parts,
            "seconds_of_the_run": self.whole and {"total": self.whole.total} | asdict(self.whole),
        }

    def table(self) -> str:
        """The same as a text table."""
        counted, flops = self.parameters, self.flops_per_token
        of_stage = f" (pipeline stage {self.stage + 1} of {self.layout.pipeline})" if self.layout.pipeline > 1 else ""
        rows = {
            "layout": f"{self.layout.world_size:,} ranks: {self.layout}; each expert on {self.layout.expert_data:,}",
            "batches": f"{self.micro_batches:,} micro-batches of {self.micro_batch} per step"
            + (f", pipeline bubble {self.bubble:.1%}" if self.bubble else ""),
            "parameters": f"{counted.total:,} in total, {counted.active:,} active per token, "
            f"{counted.without_embeddings:,} without embeddings",
            "": ", ".join(f"{name} {value:,}" for name, value in asdict(counted).items() if value),
            "FLOPs per token": f"{flops.total:,} in training (forward and backward)",
            " ": ", ".join(f"{name} {value / flops.total:.1%}" for name, value in asdict(flops).items() if value),
            "tokens per step": f"{self.tokens_per_step:,}, {self.tokens_per_step * flops.total / 1e12:.3g} TFLOP",
            "memory per rank": f"{_sizes(self.memory)}{of_stage}",
            **({"host memory per rank": _sizes(self.host)} if self.host else {}),
            "recompute": f"{self.recompute}; activations by mode: {', '.join(map(self._mode, self.activations))}",
            **{f"sent {link.replace('_', ' ')}": _sizes(self._sent(link)) for link in ("inside_node", "across_nodes")},
            **({"dispatch": self.dispatch} if self.dispatch else {}),
            **({"nodes per token": _of_nodes(self.node_limit)} if self.node_limit else {}),
            **(self._times(self.machine, self.time, self.whole) if self.machine and self.time and self.whole else {}),
        }
        return "\n".join([aligned_facts(rows), *(self.time.bars() if self.time else [])])

    def _times(self, machine: Machine, time: StepTime, whole: RunSeconds) -> dict[str, str]:
        """The time of the run, and last that of a step, under which the bars are."""
        counts = {
            "start-up": whole.startup,
            f"{self.training.steps:,} steps": whole.steps,
            f"{evaluations(self.training):,} evaluations": whole.evaluations,
            f"{checkpoints(self.training):,} checkpoints": whole.checkpoints,
        }
        parts = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in counts.items() if seconds)
        price = ""
        if machine.price:
            price = f"; it costs {whole.total / 3600 * self.layout.world_size * machine.price:,.0f}"
        used = f", {self.mfu:.1%} of the peak" if self.mfu is not None else ""
        return {
            "time of the run": f"{format_duration(whole.total)} without failures ({parts}){price}",
            "time of a step": f"{duration(time.total)} on {machine.name}{used}",
        }

    def _mode(self, mode: str) -> str:
        extra = self.extra_flops[mode] / self.flops_per_token.total
        return f"{mode} {size(self.activations[mode].peak)}" + (f" (+{extra:.0%} FLOPs)" if extra else "")

    def _sent(self, link: str) -> dict[str, int]:
        return {name: getattr(each, link) for name, each in self.communication.items()}


def estimate(
    run: RunShape, stage: int | None = None, machine: Machine | None = None, imbalance: float = 1.0
) -> RunEstimate:
    """Estimate the cost of a run.

    Args:
        stage: the pipeline stage (from 0) whose memory to report; None for the one with the most memory.
        machine: on which to predict the times of a step and of the run; None for no prediction.
        imbalance: as in `step_time`.
    """
    time = None if machine is None else step_time(run, machine, imbalance)
    config, stages = run.config, range(run.layout.pipeline)
    held = {each: memory(run, each) for each in (stages if stage is None else [stage])}
    most = max(held, key=lambda each: held[each].total)
    own, sent = run.stage_model(most), [traffic(run, each) for each in stages]
    return RunEstimate(
        layout=run.layout,
        micro_batch=config.training.micro_batch,
        micro_batches=run.micro_batches,
        bubble=bubble(run),
        parameters=closed_forms.parameters(run.model),
        flops_per_token=closed_forms.training_flops(run.model),
        tokens_per_step=config.training.global_batch * config.model.seq_length,
        stage=most,
        memory=held[most].kinds,
        measured=held[most].measured,
        host=held[most].host,
        recompute=config.moe.recompute,
        activations={mode: activations(own, run.stage_pass(most, mode)) for mode in get_args(Recompute)},
        extra_flops={mode: extra_flops(run.model, mode) for mode in get_args(Recompute)},
        communication=max(sent, key=lambda kinds: sum(kinds.values(), Sent(0, 0)).total),
        dispatch=dispatch(run),
        node_limit=node_limit(run),
        training=config.training,
        machine=machine,
        time=time,
        whole=None if machine is None or time is None else run_time(run, machine, time, validation_samples(config)),
    )


def vocabulary(config: RunConfig, *, data_needed: bool = False) -> int:
    """Rows of the embedding: `model.vocab_size`, or the padded size of the tokenizer of the prepared data.

    Args:
        data_needed: missing data is an error even if `model.vocab_size` is given.

    Raises:
        ConfigError: neither is available, or the data do not fit the config (see `check_data`).
    """
    manifest = check_data(config, needed=data_needed)
    if manifest is not None:
        return padded_vocabulary(config, manifest.vocab_size)
    if config.model.vocab_size is None:
        missing = next(data_folders(config.data))
        if missing.is_prefix:
            raise ConfigError(f"model.vocab_size is null: {missing.without_tokenizer}")
        raise ConfigError(
            "model.vocab_size is null: without prepared data it must be set "
            f"(there is no folder {missing.path}, which {missing.setting} names)"
        )
    return config.model.vocab_size


def size(count: int) -> str:
    """Bytes as text, in MiB or GiB."""
    return f"{count / 2**30:,.1f} GiB" if count >= 10 * 2**30 else f"{count / 2**20:,.1f} MiB"


def _of_nodes(limit: NodeLimit) -> str:
    nodes = f"at most {limit.most} of {limit.nodes} in an iteration, {limit.mean:.2f} on average"
    across, without = size(limit.across_nodes), size(limit.across_nodes_without_groups)
    return f"{nodes} ({limit.mean_without_groups:.2f} without groups); {across} across nodes ({without} without groups)"


def _sizes(parts: dict[str, int]) -> str:
    listed = ", ".join(f"{name.replace('_', '-')} {size(value)}" for name, value in parts.items() if value)
    return size(sum(parts.values())) + (f" ({listed})" if listed else "")
