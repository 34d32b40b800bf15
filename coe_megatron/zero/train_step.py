"""Passes of many micro-batches: one after the other, or through Megatron's pipeline schedule (1F1B).

    loss = train_step(engine, batches, forward, loss_of)     # forward, backward, reduction, optimizer step
    sums = evaluate(engine, batches, forward, sums_of, size)

`forward(model, batch)` runs this rank's stage: the last one returns what `loss_of(output, batch)` takes, the others
hidden states, which the schedule sends on. All ranks that hold one model between them give the same batches.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from coe_megatron.zero.engine import Engine, backward

Batch: TypeAlias = dict[str, torch.Tensor]
Forward: TypeAlias = Callable[[torch.nn.Module, Batch], torch.Tensor]
Reduce: TypeAlias = Callable[[torch.Tensor, Batch], torch.Tensor]


def train_step(
    engine: Engine,
    batches: Sequence[Batch],
    forward: Forward,
    loss_of: Reduce,
    after_backward: Callable[[], None] = lambda: None,
    largest: float | None = None,
) -> torch.Tensor:
    """One optimizer step over its micro-batches; what their gradients are, `zero.engine` says.

    A step whose loss or gradient is not finite anywhere changes nothing, on no rank: neither weights nor what the
    optimizer has; `zero.engine.was_applied` tells.

    Args:
        batches: as many as the engine accumulates, their `tokens` [B, S] all of one shape; brought to the device one by
            one.
        loss_of: a scalar, whose sum over micro-batches and ranks is what the step lowers.
        after_backward: called when a backward pass has ended and its gradients are there; of a pipeline when all have.
        largest: a step whose loss (the sum over micro-batches and ranks) is larger changes nothing either. It costs an
            all-reduce of one number before the last backward pass.

    Returns:
        The sum over these micro-batches, float64, on all ranks that hold the model.
    """
    losses: list[torch.Tensor] = []  # on the last stage

    def noted(loss: torch.Tensor) -> torch.Tensor:
        losses.append(loss.detach())
        return loss * _one_or_nan(losses, largest if len(losses) == len(batches) else None)

    if _stages() == 1:
        for batch in map(_on_device, batches):
            backward(engine, noted(loss_of(forward(engine, batch), batch)))
            after_backward()
            engine.step()
        return torch.stack(losses).double().sum()

    def scaled(output: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        # The schedule divides by the number of micro-batches, and DeepSpeed by that of replicas.
        loss = noted(loss_of(output, batch))
        return loss * (len(batches) * engine.dp_world_size), losses[-1]

    _through_stages(engine, batches, forward, scaled)
    after_backward()
    engine.step()  # reduces as well: the engine was told that the backward passes are not its own
    return _from_last_stage(losses, ())


@torch.no_grad()
def evaluate(engine: Engine, batches: Sequence[Batch], forward: Forward, sums_of: Reduce, size: int) -> torch.Tensor:
    """The sum over micro-batches of what `sums_of` returns, [size] float64; on all ranks that hold the model."""
    was_training = engine.training
    engine.eval()
    if _stages() == 1:
        total = torch.stack([sums_of(forward(engine, batch), batch) for batch in map(_on_device, batches)]).sum(0)
    else:
        sums = _through_stages(
            engine, batches, forward, lambda output, batch: (output.sum(), sums_of(output, batch)), forward_only=True
        )
        total = _from_last_stage(sums, (size,))
    engine.train(was_training)
    return total


def _one_or_nan(losses: Sequence[torch.Tensor], largest: float | None) -> torch.Tensor:
    """The factor of the newest of a step's losses: NaN makes gradients NaN, and DeepSpeed leaves such a step out.

    Where `largest` is given it is NaN if the losses of all replicas together are above it; the host does not look.
    """
    if largest is None:
        return losses[-1] * 0 + 1  # NaN where the loss is not finite: there may be losses whose gradient is
    total = torch.stack(list(losses)).double().sum()
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return torch.where(total <= largest, 1.0, torch.nan).to(losses[-1])


def _on_device(batch: Batch) -> Batch:
    return {name: tensor.to(torch.cuda.current_device()) for name, tensor in batch.items()}


def _stages() -> int:
    return parallel_state.get_pipeline_model_parallel_world_size()


def _through_stages(
    engine: Engine,
    batches: Sequence[Batch],
    forward: Forward,
    scalar_and_noted: Callable[[torch.Tensor, Batch], tuple[torch.Tensor, torch.Tensor]],
    forward_only: bool = False,
) -> list[torch.Tensor]:
    """Megatron's schedule: what `scalar_and_noted` notes of each micro-batch on the last stage, elsewhere nothing."""

    def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        batch = next(iterator)
        return forward(model, batch), lambda output: scalar_and_noted(output, batch)

    rows, length = batches[0]["tokens"].shape
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=map(_on_device, batches),
        model=engine.module,
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )


def _from_last_stage(noted: list[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """The sum of what the last stage has noted, float64, on all stages."""
    device = torch.cuda.current_device()
    total = torch.stack(noted).double().sum(0) if noted else torch.zeros(shape, dtype=torch.float64, device=device)
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(total, last, group=parallel_state.get_pipeline_model_parallel_group())
    return total
