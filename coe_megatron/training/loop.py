"""Pretraining: from a config to a trained model with its metrics and checkpoints. Called by launch/pretrain_coe.py.

A step takes `global_batch` samples. Each micro-batch contributes the sum of its token losses over the number of counted
tokens of the whole step, on all ranks and in all micro-batches, so that a token weighs the same wherever it falls.
"""

import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state

from coe_megatron.checkpoint.manager import CheckpointManager, TrainState
from coe_megatron.checkpoint.save_load import CheckpointNotSaved
from coe_megatron.config import RunConfig
from coe_megatron.data.run_data import RunData
from coe_megatron.distributed import process_groups as groups
from coe_megatron.distributed.collectives import all_gather, is_rank0, run_on_rank0
from coe_megatron.errors import ConfigError
from coe_megatron.estimate import closed_forms
from coe_megatron.estimate.checkpoint_size import checkpoint_bytes
from coe_megatron.estimate.node_crossing import needless_crossing
from coe_megatron.estimate.run_estimate import estimate, vocabulary
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.model import routing_stats as stats
from coe_megatron.model.build import build_model
from coe_megatron.run import disk_space as room
from coe_megatron.run import folder as run_folder
from coe_megatron.run.exit_status import ExitStatus
from coe_megatron.training import devices, evaluation, recovery
from coe_megatron.training import memory_meter as memory
from coe_megatron.training.data_shard import open_data_shard
from coe_megatron.training.layout_map import layout_map
from coe_megatron.training.lr_schedule import learning_rate
from coe_megatron.training.metrics import CompositeMetrics, open_metrics
from coe_megatron.training.profiling import ProfileWindow
from coe_megatron.training.progress import Progress
from coe_megatron.training.signals import StopRequest
from coe_megatron.training.watchdog import HangDetector, collective_timeout
from coe_megatron.zero import engine as zero
from coe_megatron.zero import train_step as passes

Result = TypeVar("Result")


class Interrupted(Exception):
    """The run was asked to stop, and has saved a checkpoint.

    Args:
        status: STOPPED, or INTERRUPTED by the keyboard.
    """

    def __init__(self, message: str, status: ExitStatus) -> None:
        super().__init__(message)
        self.status = status


def train(
    config: RunConfig,
    ranks: groups.DistributedEnv,
    store: torch.distributed.Store | None = None,
    interruption: StopRequest | None = None,
    last_word: Callable[[int, str], None] = lambda _status, _line: None,
) -> run_folder.Outcome | None:
    """Train, or go on from the newest checkpoint in the run's folder; the outcome on rank 0, None on other ranks.

    Args:
        store: the rendezvous store of the ranks (`rendezvous`), if they have one.
        interruption: notes what asks the run to stop; one of the run's own when None.
        last_word: called with an exit status and a line before a hanging process is ended.

    Raises:
        ConfigError: config, data and folder do not fit together; one line that says what would.
        Interrupted: the run was asked to stop; all ranks have stopped after the same step and saved.
        Diverged: the loss, and nothing that `recovery` allows has helped.
        CheckpointNotSaved: the last checkpoint could not be written.
        OutputLost: the output folder was removed or moved meanwhile.
    """
    if config.training.deterministic:
        devices.make_deterministic()
    limit = config.recovery.hang_after
    with ExitStack() as stack:
        if interruption is None:
            interruption = StopRequest()
            stack.callback(interruption.restore_handlers)
        watch = stack.enter_context(HangDetector(Path(config.output) / "stacks", ranks.rank, limit, last_word))
        device = groups.start(config.parallel, config.training.seed, ranks, collective_timeout(limit), store)
        with run_on_rank0(lambda: run_folder.begin(config, ranks.log_dir), shared=False) or nullcontext() as output:
            outcome = _attempt(config, ranks, device, interruption, watch, output)
        groups.stop()
    return outcome


def _attempt(
    config: RunConfig,
    ranks: groups.DistributedEnv,
    device: torch.device,
    interruption: StopRequest,
    watch: HangDetector,
    output: run_folder.RunFolder | None,
) -> run_folder.Outcome | None:
    """One attempt in a folder that is begun (on rank 0 `output`); however it ends, run.json says so."""
    run = None
    try:
        shape = run_on_rank0(lambda: RunShape.of(config, vocabulary(config, data_needed=True), ranks.world_size))
        if warning := run_on_rank0(lambda: room.require(shape), shared=False):
            print(warning, file=sys.stderr)
        run = Pretraining(shape, device, interruption, watch, ranks.node_rank, output)
        first = run.position.step
        run.run()
        return run_on_rank0(lambda: None if output is None else output.finish(), shared=False)
    except ConfigError as error:
        if output is not None and (run is None or run.position.step == first):
            output.withdraw()
        elif output is not None:  # of data that was damaged meanwhile: what the run has done stays
            output.end(f"failed: {error}")
        raise
    except BaseException as error:
        if output is not None:
            output.end("interrupted" if isinstance(error, Interrupted) else f"failed: {error!r}")
        raise


class Pretraining:
    """One run on this rank: data, model, engine, and the loop over the steps."""

    def __init__(
        self, shape: RunShape, device: torch.device, interruption: StopRequest, watch: HangDetector, node: int,
        output: run_folder.RunFolder | None,
    ) -> None:  # fmt: skip
        """Args: `output` is the run's folder on rank 0, None on other ranks."""
        self.output = output
        self.shape, self.config = shape, shape.config
        self.device, self.folder, config = device, Path(shape.config.output), shape.config
        self.interruption, self.watch = interruption, watch
        self.main_rank = is_rank0()
        data = run_on_rank0(lambda: RunData.open(config.data))
        self.data = open_data_shard(config, data, self.folder / "index")
        self.engine = self._build_engine()
        self.checkpoints = CheckpointManager(self.folder, config, data, self.engine, checkpoint_bytes(shape))
        self.position, self.begun = self.checkpoints.resume()
        self.flops = closed_forms.training_flops(shape.model)
        self.peak_flops = devices.peak_flops(config.training.precision)
        self.memory = memory.MemoryMeter(self.engine)
        self.nodes = all_gather([f"node {node} {platform.node()}"])
        # With nodes as they are, whatever `parallel.ranks_per_node` says; it reads files.
        parallel = replace(config.parallel, ranks_per_node=min(Counter(self.nodes).values()))
        self.placed = shape.changed(replace(config, parallel=parallel))
        stage = parallel_state.get_pipeline_model_parallel_rank()
        self.cost = estimate(self.placed, stage) if self.main_rank else None

    def run(self) -> None:
        """All steps that are left, with evaluations and checkpoints on the way."""
        first, steps = self.position.step, self.config.training.steps
        seen = chain.from_iterable(part.batches for part in self.data.validation.values())
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
            stack.callback(lambda: self.progress.close())  # whichever there is then
            self.interruption.handle_sigint()
            stack.enter_context(self.checkpoints)
            self._greet()
            self._run_steps(first, steps)

    def _run_steps(self, first: int, steps: int) -> None:
        if first == 0:
            self.watch.heartbeat("the first evaluation")
            values = self._validate()
            self._require_output()
            self.writer.write({"step": 0, "tokens": 0, **values})
            self.progress.step(0, evaluation.progress_losses(values))
        clock = _Clock(self.position)
        window = ProfileWindow(self.config.profile, self.folder / "profile", torch.distributed.get_rank())
        while self.position.step < steps:
            step = self.position.step + 1
            self.watch.heartbeat(f"step {step}")
            with clock.stopped():
                window.before_step(step)
            loss, asked = self._train_step(step - 1)
            with clock.stopped():
                if said := window.after_step(step):
                    self.progress.say(said)
            if recovery.rollback_due(self.config.recovery, self.position):
                self._roll_back()
                clock, log, save = _Clock(self.position), False, bool(asked)
            else:
                log, save = self._due("log_every", "evaluate_every"), self._due("save_every") or bool(asked)
                save = save or step in self.config.training.milestones
                self.watch.heartbeat(f"logging and evaluating after step {step}")
                self.progress.step(step, self._log(loss, clock) if log else None)
            if log or save:
                self._save(save, log, last=bool(asked) or step == steps)
                clock = _Clock(self.position)  # evaluating and saving are not training time
            if asked and self.position.step < steps:
                raise Interrupted(f"stopped after step {self.position.step} of {steps}", asked)

    def _save(self, due: bool, logged: bool, last: bool) -> None:
        self.watch.heartbeat(f"the checkpoint of step {self.position.step}")
        self._require_output()
        try:
            said = self.checkpoints.after_step(self.position, due, logged, last)
        except CheckpointNotSaved:
            self._require_output()  # which says more
            raise
        if said:
            self.progress.say(said)

    def _require_output(self) -> None:
        """Before a write, on all ranks: nothing is made anew where the output folder was."""
        run_on_rank0(lambda: None if self.output is None else self.output.require_present())

    def _roll_back(self) -> None:
        """Go on from an earlier checkpoint, with data that no step has met; what was logged since is forgotten."""
        self.watch.heartbeat("rolling back")
        self._require_output()
        self.position, said = recovery.roll_back(self.config, self.position, self.checkpoints)
        self.progress.close()
        self.progress = Progress(self.position.step, self.config.training.steps, visible=self.main_rank)
        self.progress.say(said)
        self.writer.rewind(self.position.step)
        if self.output is not None:
            self.output.record({"rollbacks": self.position.rollbacks})

    def _train_step(self, step: int) -> tuple[float, ExitStatus]:
        """One optimizer step; returns its loss in nats per counted token, and whether a rank was asked to stop."""
        model, settings, policy = self.engine.module, self.config.optimizer, self.config.recovery
        last = step + 1 == self.config.training.steps
        stats.reset_routing(model, detailed=self._due("log_every", "evaluate_every", ahead=1), pairs=last)
        batches = self.data.batches.for_step(step + self.position.data_offset)
        own = torch.stack([batch["loss_mask"].sum() for batch in batches]).double().sum()
        counted = float(evaluation.all_reduce_sum(own))
        asked = _agreed(self.interruption.status())
        zero.set_lr(self.engine, learning_rate(settings, step, self.config.training.steps))
        with self.memory.step():
            total = passes.train_step(
                self.engine,
                batches,
                evaluation.forward,
                lambda token_losses, batch: evaluation.masked_loss_sum(token_losses, batch) / max(counted, 1),
                self.memory.after_backward,
                recovery.loss_limit(policy, self.position),
            )
        loss, taken = float(evaluation.all_reduce_sum(total)), zero.was_applied(self.engine)
        stats.finish_step(model, taken)
        self.position.step, self.position.tokens = step + 1, self.position.tokens + int(counted)
        if said := recovery.record_step(policy, self.position, loss, taken):
            self.progress.say(said)
        return loss, asked

    def _log(self, loss: float, clock: "_Clock") -> dict[str, float]:
        """Write a metrics object for the step just done; returns what the progress line shows."""
        seconds, tokens_per_second = clock.read()
        positions = self.config.training.global_batch * self.config.model.seq_length
        flops = self.flops.total * positions / seconds / torch.distributed.get_world_size()
        reports = stats.report_routing(self.engine.module)
        step, settings = self.position.step, self.config.optimizer
        values: dict[str, Any] = {
            "step": step,
            "tokens": self.position.tokens,
            "train_loss": loss,
            "skipped_steps": self.position.skipped_steps,
            "rollbacks": len(self.position.rollbacks),
            "data_offset": self.position.data_offset,
            "learning_rate": learning_rate(settings, step - 1, self.config.training.steps),
            "grad_norm": zero.gradient_norm(self.engine),
            **stats.summary(reports),
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
        return evaluation.validate(self.engine, self.data.validation)

    def _due(self, *settings: str, ahead: int = 0) -> bool:
        step, training = self.position.step + ahead, self.config.training
        return step == training.steps or any(step % getattr(training, name) == 0 for name in settings)

    def _build_engine(self) -> zero.Engine:
        config = self.config
        model = build_model(config, self.shape.vocab_size)
        engine = zero.build_engine(model, config.optimizer, config.training, config.zero, self.shape.micro_batches)
        groups.seed_dropout(config.training.seed)
        return engine

    def _facts(self, entropy: float) -> dict[str, Any]:
        """What run.json says of a run beyond its config."""
        counted, settings, moe = closed_forms.parameters(self.shape.model), self.config.chain, self.config.moe
        name = "MoE" if settings.iterations == 1 else f"CoE-{settings.iterations}"
        notation = f"{name}({moe.topk}/{moe.num_experts}){f'+{moe.num_shared_experts}' * bool(moe.num_shared_experts)}"
        return {
            "model": f"{notation}, {self.config.model.num_layers} layers, {settings.norm_placement}",
            "parameters": asdict(counted) | {"total": counted.total, "active": counted.active},
            "flops_per_token": self.flops.total,
            "unigram_entropy": entropy,
            "truncated_fraction": self.data.truncated_fraction,
            "ranks": torch.distributed.get_world_size(),
            "device": str(self.device),
            "rollbacks": self.position.rollbacks,
        }

    def _greet(self) -> None:
        counted, ranks = closed_forms.parameters(self.shape.model), self.shape.layout
        self.progress.say(
            f"{counted.total:,} parameters on {ranks.world_size} rank{'s' * (ranks.world_size > 1)} "
            f"({self.device.type}): {ranks}"
        )
        if ranks.world_size > 1:
            self.progress.say(layout_map(ranks, self.nodes, self.config.moe.num_experts))
            if self.cost and (warning := needless_crossing(self.placed, self.cost)):
                self.progress.say(f"warning: {warning}")
        if self.data.truncated_fraction > 0.05:
            self.progress.say(
                f"{self.data.truncated_fraction:.0%} of the training documents are longer than model.seq_length "
                f"({self.config.model.seq_length}) and lose their end; data.samples packed loses nothing"
            )
        if self.begun:
            self.progress.say(self.begun)


def _agreed(asked: ExitStatus) -> ExitStatus:
    """What any rank was asked, on all ranks: those of one data-parallel group are not all there are."""
    status = torch.tensor(int(asked), device=torch.cuda.current_device())
    torch.distributed.all_reduce(status, torch.distributed.ReduceOp.MAX)
    return ExitStatus(int(status))


class _Clock:
    """Times the steps from its making on."""

    def __init__(self, position: TrainState) -> None:
        self._position, self._began = position, time.perf_counter()
        self._step, self._tokens = position.step, position.tokens

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What is done meanwhile does not count."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def read(self) -> tuple[float, float]:
        """Seconds a step, and counted tokens a second over all ranks."""
        seconds = time.perf_counter() - self._began
        steps = self._position.step - self._step
        return seconds / steps, (self._position.tokens - self._tokens) / seconds
