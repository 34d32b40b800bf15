"""Attempts of a run in this very process, with something planted: in the data of some steps, or before some steps."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from coe_megatron.config import RunConfig, parse
from coe_megatron.data.datasets import StepBatches
from coe_megatron.data.samples import Sample
from coe_megatron.estimate.run_estimate import vocabulary
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.run import folder as run_folder
from coe_megatron.training import evaluation
from coe_megatron.training.loop import Pretraining
from coe_megatron.training.signals import StopRequest
from coe_megatron.training.watchdog import HangDetector


class Killed(BaseException):
    """As SIGKILL: nothing is noted, nothing is saved."""


def small(data: Path, output: Path, recovery: Mapping[str, Any] | None = None, **training: Any) -> RunConfig:
    """A run of twelve steps, a checkpoint every four, everything logged; dropout and accumulation are on."""
    return parse(
        {
            "output": str(output),
            "model": {
                "num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 32, "hidden_dropout": 0.1,
            },
            "moe": {"num_experts": 4, "topk": 2, "ffn_hidden_size": 16},
            "data": {"path": str(data), "validation_samples": 4},
            "optimizer": {"lr": 3e-3},
            "training": {
                "steps": 12, "global_batch": 8, "micro_batch": 2, "log_every": 1, "evaluate_every": 12, "save_every": 4,
                **training,
            },
            "logging": {"tensorboard": False},
            "recovery": {"hang_after": None, **(recovery or {})},
        }
    )  # fmt: skip


def attempt(config: RunConfig, before_step: Callable[[Pretraining, int], None] = lambda _run, _step: None) -> None:
    """One attempt on the ranks that there are; `before_step(run, step)` (1-based) may do anything to it."""
    torch.manual_seed(config.training.seed)
    model_parallel_cuda_manual_seed(config.training.seed)
    folder, main = Path(config.output), torch.distributed.get_rank() == 0
    output = run_folder.begin(config) if main else None
    interruption, shape = StopRequest(), RunShape.of(config, vocabulary(config), torch.distributed.get_world_size())
    try:
        run = Pretraining(shape, torch.device("cpu"), interruption, HangDetector(folder, 0, None, _nothing), 0, output)
        trained = run._train_step
        run._train_step = lambda step: (before_step(run, step + 1), trained(step))[1]  # type: ignore[method-assign]
        run.run()
        if output is not None:
            output.finish()
    finally:
        interruption.restore_handlers()
        if output is not None:
            output.close()


def _nothing(_status: int, _line: str) -> None:
    pass


@contextmanager
def planted(factors: Mapping[int, float], rank: int = 0) -> Iterator[None]:
    """Meanwhile the loss of one micro-batch of rank `rank` is multiplied, at steps of data (0-based) in `factors`."""
    plain_batches, plain_loss = StepBatches.for_step, evaluation.masked_loss_sum

    def for_step(self: StepBatches, step: int) -> list[Sample]:
        batches = plain_batches(self, step)
        if step in factors and torch.distributed.get_rank() == rank:
            batches[0]["planted"] = torch.tensor(factors[step])
        return batches

    def masked_loss_sum(token_losses: torch.Tensor, batch: Sample) -> torch.Tensor:
        return plain_loss(token_losses, batch) * batch.get("planted", torch.tensor(1.0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepBatches, "for_step", for_step)
        patch.setattr(evaluation, "masked_loss_sum", masked_loss_sum)
        yield
