"""Pretraining: from a config to a trained model with its metrics and checkpoints. Called by cli/pretraining.py.

A step takes `global_batch` samples. Each micro-batch contributes the sum of its token losses over the number of counted
tokens of the whole step, on all ranks and in all micro-batches, so that a token weighs the same wherever it falls.
"""

import itertools
import math
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state

from coe_megatron.checkpoint.manager import CheckpointManager, TrainState
from coe_megatron.checkpoint.save_load import CheckpointNotSaved
from coe_megatron.config import RunConfig
from coe_megatron.config.describe import notation
from coe_megatron.data.run_data import RunData
from coe_megatron.distributed import process_groups
from coe_megatron.distributed.collectives import Pending, all_gather, is_rank0, read, run_on_rank0, start_sum, to_device
from coe_megatron.errors import ConfigError
from coe_megatron.estimate import closed_forms
from coe_megatron.estimate.checkpoint_size import checkpoint_bytes
from coe_megatron.estimate.dispatch import resolved
from coe_megatron.estimate.node_crossing import needless_crossing
from coe_megatron.estimate.run_estimate import estimate, vocabulary
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.model import routing_stats
from coe_megatron.model.build import build_model, require_backend
from coe_megatron.model.router_state import update_router_state, weigh_over_step
from coe_megatron.run import disk_space
from coe_megatron.run import folder as run_folder
from coe_megatron.run.exit_status import ExitStatus
from coe_megatron.training import devices, evaluation, recovery
from coe_megatron.training.data_shard import open_data_shard
from coe_megatron.training.layout_map import layout_map
from coe_megatron.training.lr_schedule import learning_rate
from coe_megatron.training.memory_meter import MemoryMeter
from coe_megatron.training.metrics import CompositeMetrics, open_metrics
from coe_megatron.training.profiling import ProfileWindow
from coe_megatron.training.progress import Progress
from coe_megatron.training.signals import StopRequest
from coe_megatron.training.watchdog import HangDetector, collective_timeout
from coe_megatron.zero import engine as zero
from coe_megatron.zero.train_step import Batch, train_step

Result = TypeVar("Result")

_REQUESTS = (ExitStatus.DONE, ExitStatus.STOPPED, ExitStatus.INTERRUPTED)  # none, and two to stop


class StoppedOnRequest(Exception):
    """The run was asked to stop, and has saved a checkpoint.

    Args:
        status: STOPPED, or INTERRUPTED by the keyboard.
    """

    def __init__(self, message: str, status: ExitStatus) -> None:
        super().__init__(message)
        self.status = status


def train(
    config: RunConfig,
    env: process_groups.DistributedEnv,
    store: torch.distributed.Store | None = None,
    stop_request: StopRequest | None = None,
    on_hang: Callable[[int, str], None] = lambda _status, _line: None,
) -> run_folder.Outcome | None:
    """Train, or resume from the most recent complete checkpoint of the run; the outcome on rank 0, None on others.

    Args:
        store: the ranks' rendezvous store (`rendezvous`), if any.
        stop_request: set by signals and the stop file; None creates one.
        on_hang: called with an exit status and a line before a hanging process exits.

    Raises:
        ConfigError: config, data and folder do not fit together; one line that says what would.
        StoppedOnRequest: the run was asked to stop; all ranks have stopped after the same step and saved.
        Diverged: the loss diverged, and `recovery` allows no further rollback.
        CheckpointNotSaved: the last checkpoint could not be written.
        OutputLost: the output folder was removed or moved during the run.
    """
    if config.training.deterministic:
        devices.make_deterministic()
    limit = config.recovery.hang_after
    with ExitStack() as stack:
        if stop_request is None:
            stop_request = StopRequest()
            stack.callback(stop_request.restore_handlers)
        hang_detector = stack.enter_context(HangDetector(Path(config.output) / "stacks", env.rank, limit, on_hang))
        require_backend(config)
        device = process_groups.start(config.parallel, config.training.seed, env, collective_timeout(limit), store)
        with run_on_rank0(lambda: run_folder.begin(config, env.log_dir), shared=False) or nullcontext() as output:
            outcome = _attempt(config, env, device, stop_request, hang_detector, output)
        process_groups.stop()
    return outcome


def _attempt(
    config: RunConfig,
    env: process_groups.DistributedEnv,
    device: torch.device,
    stop_request: StopRequest,
    hang_detector: HangDetector,
    output: run_folder.RunFolder | None,
) -> run_folder.Outcome | None:
    """One attempt of the run; run.json records how it ends. `output` is the run's folder on rank 0, None elsewhere."""
    run = None
    try:
        shape = run_on_rank0(lambda: resolved(config, vocabulary(config, data_needed=True), env.world_size))
        if warning := run_on_rank0(lambda: disk_space.require(shape), shared=False):
            print(warning, file=sys.stderr)
        run = Pretraining(shape, device, stop_request, hang_detector, env.node_rank, output)
        first = run.state.step
        run.run()
        return run_on_rank0(lambda: None if output is None else output.finish(), shared=False)
    except ConfigError as error:
        if output is not None and (run is None or run.state.step == first):
            output.withdraw()
        elif output is not None:  # damaged data, found after some steps, whose results are kept
            output.end(f"failed: {error}")
        raise
    except BaseException as error:
        if output is not None:
            output.end("interrupted" if isinstance(error, StoppedOnRequest) else f"failed: {error!r}")
        raise


class Pretraining:
    """One run on this rank: data, model, engine, and the loop over the steps."""

    def __init__(
        self, shape: RunShape, device: torch.device, stop_request: StopRequest, hang_detector: HangDetector, node: int,
        output: run_folder.RunFolder | None,
    ) -> None:  # fmt: skip
        """Args: `output` is the run's folder on rank 0, None on other ranks."""
        self.output = output
        self.shape, self.config = shape, shape.config
        self.device, self.folder, config = device, Path(shape.config.output), shape.config
        self.stop_request, self.hang_detector = stop_request, hang_detector
        self.main_rank = is_rank0()
        data = run_on_rank0(lambda: RunData.open(config.data, config.model.vocab_size))
        self.data = open_data_shard(config, data, self.folder / "index")
        self.engine = self._build_engine()
        self.checkpoints = CheckpointManager(self.folder, config, data, self.engine, checkpoint_bytes(shape))
        self.state, self.start_message = self.checkpoints.resume()
        self.flops = closed_forms.training_flops(shape.model)
        self.peak_flops = devices.peak_flops(config.training.precision)
        self.memory = MemoryMeter(self.engine)
        self.grad_norm = math.nan  # of the last step
        self.answers = None
        if config.training.evaluate_answers:
            from coe_megatron.training.answer_accuracy import AnswerCheck  # of what few runs need

            self.answers = AnswerCheck(config)
        self.nodes = all_gather([f"node {node} {platform.node()}"])
        # Replace `parallel.ranks_per_node` by the actual number.
        parallel = replace(config.parallel, ranks_per_node=min(Counter(self.nodes).values()))
        self.placed_shape = shape.changed(replace(config, parallel=parallel))
        stage = parallel_state.get_pipeline_model_parallel_rank()
        self.cost = estimate(self.placed_shape, stage) if self.main_rank else None

    def run(self) -> None:
        """Run the remaining steps, with evaluations and checkpoints."""
        first, steps = self.state.step, self.config.training.steps
        seen = itertools.chain.from_iterable(part.batches for part in self.data.validation.values())
        entropy = evaluation.unigram_entropy(seen, self.shape.vocab_size)
        if self.output is not None:
            self.output.describe(self._facts(entropy), self.config, done=first >= steps)
        with ExitStack() as stack:
            opened = run_on_rank0(
                lambda: open_metrics(self.folder, self.config, first) if first < steps else None, shared=False
            )
            self.writer = opened or CompositeMetrics()
            stack.callback(self.writer.close)
            self.progress = Progress(first, steps, visible=self.main_rank)
            stack.callback(lambda: self.progress.close())  # a rollback replaces it
            self.stop_request.handle_sigint()
            stack.enter_context(self.checkpoints)
            self._print_start()
            self._run_steps(first, steps)

    def _run_steps(self, first: int, steps: int) -> None:
        if first == 0:
            self.hang_detector.heartbeat("the first evaluation")
            values = self._validate()
            self._require_output()
            self.writer.write({"step": 0, "tokens": 0, **values})
            self.progress.step(0, evaluation.progress_losses(values))
        clock = _Clock(self.state)
        window = ProfileWindow(self.config.profile, self.folder / "profile", torch.distributed.get_rank())
        while self.state.step < steps:
            step = self.state.step + 1
            self.hang_detector.heartbeat(f"step {step}")
            with clock.stopped():
                window.before_step(step)
            loss, stop = self._train_step(step - 1)
            with clock.stopped():
                if message := window.after_step(step):
                    self.progress.say(message)
            if recovery.rollback_due(self.config.recovery, self.state):
                self._roll_back()
                clock, log, save = _Clock(self.state), False, bool(stop)
            else:
                log, save = self._due("log_every", "evaluate_every"), self._due("save_every") or bool(stop)
                save = save or step in self.config.training.milestones
                self.hang_detector.heartbeat(f"logging and evaluating after step {step}")
                self.progress.step(step, self._log(loss, clock) if log else None)
            if log or save:
                self._save(save, log, last=bool(stop) or step == steps)
                clock = _Clock(self.state)  # evaluating and saving are not training time
            if stop and self.state.step < steps:
                raise StoppedOnRequest(f"stopped after step {self.state.step} of {steps}", stop)

    def _save(self, due: bool, logged: bool, last: bool) -> None:
        self.hang_detector.heartbeat(f"the checkpoint of step {self.state.step}")
        if not logged:  # which has looked just now
            self._require_output()
        try:
            message = self.checkpoints.after_step(self.state, due, logged, last)
        except CheckpointNotSaved:
            self._require_output()  # which says more
            raise
        if message:
            self.progress.say(message)

    def _require_output(self) -> None:
        """Check, on all ranks before a write, that the output folder still exists: it must not be created again."""
        run_on_rank0(lambda: None if self.output is None else self.output.require_present())

    def _roll_back(self) -> None:
        """Load an earlier checkpoint, skip the data up to here, and delete the metrics logged since."""
        self.hang_detector.heartbeat("rolling back")
        self._require_output()
        self.state, message = recovery.roll_back(self.config, self.state, self.checkpoints)
        self.progress.close()
        self.progress = Progress(self.state.step, self.config.training.steps, visible=self.main_rank)
        self.progress.say(message)
        self.writer.rewind(self.state.step)
        if self.output is not None:
            self.output.record({"rollbacks": self.state.rollbacks})

    def _train_step(self, step: int) -> tuple[float, ExitStatus]:
        """One optimizer step; returns its loss in nats per counted token, and how any rank was asked to stop."""
        model, settings, policy = self.engine.module, self.config.optimizer, self.config.recovery
        last = step + 1 == self.config.training.steps
        routing_stats.reset_routing(model, detailed=self._due("log_every", "evaluate_every", ahead=1), pairs=last)
        batches = self.data.batches.for_step(step + self.state.data_offset)
        own = torch.stack([batch["loss_mask"].sum() for batch in batches]).double().sum()
        counted = start_sum(own, process_groups.replicas())  # hidden by the first forward pass
        if self.config.moe.auxiliary_mean == "step":
            weigh_over_step(model, mean_tokens(batches))
        agreed: list[Pending] = []
        zero.set_lr(self.engine, learning_rate(settings, step, self.config.training.steps))
        with self.memory.step():
            train_step(
                self.engine,
                batches,
                evaluation.forward,
                lambda losses, batch: evaluation.masked_loss_sum(losses, batch) / counted.result().clamp(min=1).float(),
                self.memory.after_backward,
                recovery.loss_limit(policy, self.state),
                lambda loss: agreed.append(_start_agreement(loss, self.stop_request.status())),
            )
        # One copy to the host per step: it waits for the device.
        loss, *stops, tokens, self.grad_norm = read(
            *agreed[0].result(), counted.result(), zero.gradient_norm(self.engine)
        )
        applied = zero.was_applied(self.grad_norm)
        update_router_state(model, applied)
        self.state.step, self.state.tokens = step + 1, self.state.tokens + int(tokens)
        if message := recovery.record_step(policy, self.state, loss, applied):
            self.progress.say(message)
        return loss, max(status for status, ranks in zip(_REQUESTS, stops, strict=True) if ranks)

    def _log(self, loss: float, clock: "_Clock") -> dict[str, float]:
        """Write the metrics of the step just done; returns the values for the progress line."""
        seconds, tokens_per_second = clock.read()
        positions = self.config.training.global_batch * self.config.model.seq_length
        flops = self.flops.total * positions / seconds / torch.distributed.get_world_size()
        reports = routing_stats.report_routing(self.engine.module)
        step, settings = self.state.step, self.config.optimizer
        values: dict[str, Any] = {
            "step": step,
            "tokens": self.state.tokens,
            "train_loss": loss,
            "skipped_steps": self.state.skipped_steps,
            "rollbacks": len(self.state.rollbacks),
            "data_offset": self.state.data_offset,
            "learning_rate": learning_rate(settings, step - 1, self.config.training.steps),
            "grad_norm": self.grad_norm,
            **routing_stats.summary(reports),
            "step_seconds": seconds,
            "tokens_per_second": tokens_per_second,
            "eta_seconds": self.progress.eta_seconds(step),
            "tflops": flops / 1e12,
            **({"mfu": flops / self.peak_flops} if self.peak_flops else {}),
            "memory": self.memory.measured(),
            "memory_predicted": self.cost.measured if self.cost else {},
            "routing": [report.as_dict() for report in reports],
        }
        shown = {"loss": loss, "tokens/s": tokens_per_second}
        if self._due("evaluate_every"):
            values |= self._validate()
            shown |= evaluation.progress_losses(values)
        self._require_output()
        self.writer.write(values)
        return shown

    def _validate(self) -> dict[str, Any]:
        values = evaluation.validate(self.engine, self.data.validation)
        return values if self.answers is None else values | self.answers.values(self.engine)

    def _due(self, *settings: str, ahead: int = 0) -> bool:
        step, training = self.state.step + ahead, self.config.training
        return step == training.steps or any(step % getattr(training, name) == 0 for name in settings)

    def _build_engine(self) -> zero.Engine:
        config = self.config
        model = build_model(config, self.shape.vocab_size)
        engine = zero.build_engine(model, config.optimizer, config.training, config.zero, self.shape.micro_batches)
        process_groups.seed_dropout(config.training.seed)
        return engine

    def _facts(self, entropy: float) -> dict[str, Any]:
        """What run.json holds besides the config."""
        counted, config = closed_forms.parameters(self.shape.model), self.config
        return {
            "model": f"{notation(config)}, {config.model.num_layers} layers, {config.chain.norm_placement}",
            "parameters": asdict(counted) | {"total": counted.total, "active": counted.active},
            "flops_per_token": self.flops.total,
            "unigram_entropy": entropy,
            "truncated_fraction": self.data.truncated_fraction,
            "ranks": torch.distributed.get_world_size(),
            "device": str(self.device),
            "rollbacks": self.state.rollbacks,
        }

    def _print_start(self) -> None:
        counted, ranks = closed_forms.parameters(self.shape.model), self.shape.layout
        self.progress.say(
            f"{counted.total:,} parameters on {ranks.world_size} rank{'s' * (ranks.world_size > 1)} "
            f"({self.device.type}): {ranks}"
        )
        if ranks.world_size > 1:
            self.progress.say(layout_map(ranks, self.nodes, self.config.moe.num_experts))
            if self.cost and (warning := needless_crossing(self.placed_shape, self.cost)):
                self.progress.say(f"warning: {warning}")
        if note := devices.slow_experts(self.config.training.precision):
            self.progress.say(note)
        if self.data.truncated_fraction > 0.05:
            self.progress.say(
                f"{self.data.truncated_fraction:.0%} of the training documents are longer than model.seq_length "
                f"({self.config.model.seq_length}) and are truncated; data.samples packed truncates nothing"
            )
        if self.start_message:
            self.progress.say(self.start_message)


def mean_tokens(batches: Sequence[Batch]) -> torch.Tensor:
    """Tokens without padding of a micro-batch, the mean over the step; collective."""
    own = torch.stack([(~batch["padding_mask"]).sum() for batch in batches]).sum().double()
    total = start_sum(own, process_groups.replicas()).result()
    return (total / (len(batches) * parallel_state.get_data_parallel_world_size())).float()


def _start_agreement(loss: torch.Tensor, stop: ExitStatus) -> Pending:
    """Sum over all ranks: the losses of the replicas of the model, and how many ranks have each of `_REQUESTS`."""
    counts = to_device(torch.tensor([float(stop == status) for status in _REQUESTS], dtype=torch.float64))
    own = loss if parallel_state.get_model_parallel_group().rank() == 0 else torch.zeros_like(loss)
    return start_sum(torch.cat([own.view(1), counts]))


class _Clock:
    """Measures time and tokens since it was created."""

    def __init__(self, state: TrainState) -> None:
        self._state, self._began = state, time.perf_counter()
        self._step, self._tokens = state.step, state.tokens

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Exclude the time spent in this context."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def read(self) -> tuple[float, float]:
        """Seconds per step, and counted tokens per second over all ranks."""
        seconds = time.perf_counter() - self._began
        steps = self._state.step - self._step
        return seconds / steps, (self._state.tokens - self._tokens) / seconds
