"""Pretraining: from a config to a trained model with its metrics and checkpoints. Called by launch/pretrain_coe.py.

A step takes `global_batch` samples. Each micro-batch contributes the sum of its token losses over the number of counted
tokens of the whole step, on all ranks and in all micro-batches, so that a token weighs the same wherever it falls.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from coe_megatron.chain import closed_forms
from coe_megatron.checkpoint import store
from coe_megatron.config import ConfigError, RunConfig
from coe_megatron.config.shape import model_shape, padded_vocabulary
from coe_megatron.data.datasets import PreparedData, StepBatches, validation_batches
from coe_megatron.modules import stats
from coe_megatron.parallel import groups
from coe_megatron.training import evaluation, memory, run_folder
from coe_megatron.training.evaluation import Batch
from coe_megatron.training.metrics import MetricsWriter
from coe_megatron.training.model import build_model
from coe_megatron.training.progress import Progress
from coe_megatron.training.schedule import learning_rate
from coe_megatron.zero import engine as zero


def train(config: RunConfig, ranks: groups.Ranks) -> run_folder.Outcome | None:
    """Train, or go on from the newest checkpoint in the run's folder; the outcome on rank 0, None on other ranks.

    Raises:
        ValueError: config and data do not fit together; one line that says what would.
    """
    run = Pretraining(config, groups.start(config.parallel, config.training.seed, ranks))
    try:
        outcome = run.run()
    except BaseException as error:
        run.close("interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {error!r}")
        raise
    run.close("finished")
    groups.stop()
    return outcome


@dataclass
class Position:
    """Where a run stands: what a checkpoint has to hold beside weights, optimizer states and random states."""

    step: int = 0
    tokens: int = 0


class Pretraining:
    """One run on this rank: data, model, engine, and the loop over the steps."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device, self.folder = config, device, Path(config.output)
        self.main_rank = torch.distributed.get_rank() == 0
        self.data_ranks = parallel_state.get_data_parallel_world_size()
        try:
            vocab_size = self._open_data(PreparedData.open(config.data.path))
        except ValueError as error:  # what is wrong with the data is the user's to know, in one line
            raise ConfigError(str(error)) from error
        self.shape = model_shape(config, vocab_size)
        self.flops = closed_forms.training_flops(self.shape)
        model = build_model(config, vocab_size)
        accumulation = config.training.global_batch // (config.training.micro_batch * self.data_ranks)
        self.engine: zero.Engine = zero.build_engine(
            model, config.optimizer, config.training, config.zero, accumulation
        )
        groups.seed_dropout(config.training.seed)
        self.position = self._resume()
        self.entropy = evaluation.unigram_entropy(self.validation, vocab_size)
        if self.main_rank:
            run_folder.begin(self.folder, config, self._facts())
        self.writer = MetricsWriter(self.folder if self.main_rank else None, self.position.step)
        self.progress = Progress(self.position.step, config.training.steps, visible=self.main_rank)

    def run(self) -> run_folder.Outcome | None:
        """All steps that are left, with evaluations and checkpoints on the way."""
        steps = self.config.training.steps
        self._greet()
        if self.position.step == 0:
            self.writer.write({"step": 0, "tokens": 0, "valid_loss": self._validate()})
        seconds: list[float] = []
        for step in range(self.position.step, steps):
            began = time.perf_counter()
            loss, positions = self._train_step(step)
            seconds.append(time.perf_counter() - began)
            self.position.step = step + 1
            logged = self._log(loss, positions, seconds) if self._due("log_every", "evaluate_every") else None
            self.progress.step(step + 1, logged)
            if self._due("save_every"):
                self._save()
        return run_folder.outcome(self.folder, self._newest_checkpoint()) if self.main_rank else None

    def close(self, outcome: str) -> None:
        """Flush what was measured and note how the run ended; also called after an error."""
        self.writer.close()
        self.progress.close()
        if self.main_rank:
            run_folder.end(self.folder, outcome)

    def _open_data(self, data: PreparedData) -> int:
        """Take up this rank's share of both splits; returns the rows of the embedding that the tokenizer needs."""
        training, settings = self.config.training, self.config.data
        share = {"dp_rank": parallel_state.get_data_parallel_rank(), "dp_size": self.data_ranks}
        train, valid = (
            data.samples(
                settings.samples,
                split,
                self.config.model.seq_length,
                seed=training.seed,
                cache_dir=self.folder / "index",
            )
            for split in ("train", "valid")
        )
        self.batches = StepBatches(
            train, seed=training.seed, global_batch=training.global_batch, micro_batch=training.micro_batch, **share
        )
        found = validation_batches(valid, training.micro_batch, **share, limit=settings.validation_samples)
        self.validation = [self._to_device(batch) for batch in found]
        return padded_vocabulary(self.config, data.tokenizer.vocab_size)

    def _resume(self) -> Position:
        """Take up the newest whole checkpoint of the run's folder, if there is one."""
        try:
            state = store.load_latest(self.folder / "checkpoints", self.engine)
        except ValueError as error:
            raise ConfigError(f"{error}; choose another output or the config it was saved with") from error
        return Position(**(state or {}))

    def _train_step(self, step: int) -> tuple[float, int]:
        """One optimizer step; returns the loss in nats per counted token and the positions passed, over all ranks."""
        stats.reset_routing(self.engine.module)
        batches = [self._to_device(batch) for batch in self.batches.for_step(step)]
        counted = float(
            evaluation.all_reduce_sum(torch.stack([batch["loss_mask"].sum() for batch in batches]).double().sum())
        )
        if not counted:
            raise ValueError(f"step {step + 1} holds no token to learn from: data.path has only empty documents there")
        zero.set_lr(self.engine, learning_rate(self.config.optimizer, step, self.config.training.steps))
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss = (evaluation.token_losses(self.engine, batch) * batch["loss_mask"]).sum() / counted
            zero.backward(self.engine, loss)
            self.engine.step()
            total += loss.detach()
        stats.update_expert_biases(self.engine.module)
        self.position.tokens += int(counted)
        return float(evaluation.all_reduce_sum(total)), self.config.training.global_batch * self.shape.seq_length

    def _log(self, loss: float, positions: int, seconds: list[float]) -> dict[str, float]:
        """Write a metrics object for the step just done; returns what the progress line shows.

        `seconds` holds the duration of every step since the last such object, and is emptied.
        """
        step_seconds, world = sum(seconds) / len(seconds), torch.distributed.get_world_size()
        seconds.clear()
        reports = stats.report_routing(self.engine.module)
        values: dict[str, Any] = {
            "step": self.position.step,
            "tokens": self.position.tokens,
            "train_loss": loss,
            "learning_rate": learning_rate(self.config.optimizer, self.position.step - 1, self.config.training.steps),
            "grad_norm": zero.gradient_norm(self.engine),
            "aux_loss": _mean([value for report in reports for value in report.losses.values()]),
            "step_seconds": step_seconds,
            "tokens_per_second": positions / step_seconds,
            "tflops": self.flops.total * positions / step_seconds / world / 1e12,
            "memory": memory.measure(self.engine),
            "routing": [{**asdict(report), "imbalance": report.imbalance} for report in reports],
        }
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of step {self.position.step} is {loss}: lower optimizer.lr")
        shown = {"loss": loss, "tokens/s": values["tokens_per_second"]}
        if self._due("evaluate_every"):
            values["valid_loss"] = shown["valid"] = self._validate()
        self.writer.write(values)
        return shown

    def _validate(self) -> float:
        return evaluation.validation_loss(self.engine, self.validation)

    def _due(self, *settings: str) -> bool:
        step, training = self.position.step, self.config.training
        return step == training.steps or any(step % getattr(training, name) == 0 for name in settings)

    def _save(self) -> None:
        store.save(
            self.folder / "checkpoints",
            self.position.step,
            self.engine,
            asdict(self.position),
            keep=self.config.training.keep_checkpoints,
        )

    def _newest_checkpoint(self) -> Path:
        whole = (path for path in (self.folder / "checkpoints").glob("step-*") if not path.suffix)
        return max(whole)

    def _facts(self) -> dict[str, Any]:
        """What run.json says of a run beyond its config."""
        counted, chain, moe = closed_forms.parameters(self.shape), self.config.chain, self.config.moe
        name = "MoE" if chain.iterations == 1 else f"CoE-{chain.iterations}"
        shared = f"+{moe.num_shared_experts}" if moe.num_shared_experts else ""
        return {
            "model": f"{name}({moe.topk}/{moe.num_experts}){shared}, {self.shape.layers} layers, {chain.topology}",
            "parameters": asdict(counted) | {"total": counted.total, "active": counted.active},
            "flops_per_token": self.flops.total,
            "unigram_entropy": self.entropy,
            "layout": {"ranks": torch.distributed.get_world_size(), **asdict(self.config.parallel)},
            "device": str(self.device),
        }

    def _greet(self) -> None:
        facts, position = self._facts(), self.position
        self.progress.say(
            f"{facts['model']}: {facts['parameters']['total']:,} parameters on {facts['layout']['ranks']} ranks "
            f"({self.device.type}), expert parallel {self.config.parallel.expert}"
        )
        if position.step:
            self.progress.say(f"resumed at step {position.step}")

    def _to_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
