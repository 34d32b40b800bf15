"""A step or an evaluation over many micro-batches: one after the other, or by Megatron's pipeline schedules (1F1B).

    loss = train_step(engine, batches, forward, loss_fn)     # forward, backward, reduction, optimizer step
    sums = evaluate(engine, batches, forward, sums_fn, size)

`forward(model, batch)` runs this rank's pipeline stage, or a part of it: the last one returns the input of
`loss_fn(output, batch)`, the others return hidden states, which the schedule sends on. All ranks of one replica pass
the same batches, or with context parallelism their parts.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from typing import TypeAlias

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from coe_megatron.distributed.collectives import to_device
from coe_megatron.distributed.process_groups import replicas
from coe_megatron.model.stage_parts import parts_of
from coe_megatron.zero.engine import Engine, backward

Batch: TypeAlias = dict[str, torch.Tensor]
Forward: TypeAlias = Callable[[torch.nn.Module, Batch], torch.Tensor]
Reduce: TypeAlias = Callable[[torch.Tensor, Batch], torch.Tensor]


def train_step(
    engine: Engine,
    batches: Sequence[Batch],
    forward: Forward,
    loss_fn: Reduce,
    after_backward: Callable[[], None] = lambda: None,
    max_loss: float | None = None,
    before_update: Callable[[torch.Tensor], None] = lambda loss: None,
) -> torch.Tensor:
    """One optimizer step over its micro-batches; the docstring of `zero.engine` defines the scale of gradients.

    The factors of a pipeline are applied here; without a pipeline, `zero.engine.backward` applies its own.

    A step with a loss or gradient that is not finite on any rank is skipped: weights and optimizer states stay
    unchanged on all ranks, and `zero.engine.was_applied` is False for its gradient norm.

    Args:
        batches: as many as the engine accumulates, `tokens` [B, S] of equal shape; moved to the device one by one. With
            context parallelism S / CP.
        loss_fn: returns a scalar; the step minimises its sum over micro-batches and ranks.
        after_backward: called after each backward pass, when its gradients exist; in a pipeline, once after all.
        max_loss: a step is also skipped if its loss (the sum over micro-batches and ranks) is larger. This costs an
            all-reduce of one number before the last backward pass.
        before_update: called with what this returns before weights are updated, to start a collective that the update
            hides.

    Returns:
        The sum of the loss over these micro-batches, float64, on all ranks that hold the model.
    """
    losses: list[torch.Tensor] = []  # on the last stage

    def recorded(loss: torch.Tensor) -> torch.Tensor:
        losses.append(loss.detach())
        return loss * _one_or_nan(losses, max_loss if len(losses) == len(batches) else None)

    if _stages() == 1:
        for batch in _on_device(batches):
            backward(engine, recorded(loss_fn(forward(engine, batch), batch)))
            after_backward()
            if len(losses) == len(batches):
                before_update(total := torch.stack(losses).double().sum())
            engine.step()
        return total

    def scaled(output: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        # Undoes the division by micro-batches / CP (Megatron's schedule) and by replicas (DeepSpeed).
        loss = recorded(loss_fn(output, batch))
        return loss * (len(batches) * engine.dp_world_size / parallel_state.get_context_parallel_world_size()), losses[
            -1
        ]

    _run_pipeline(engine, batches, forward, scaled)
    after_backward()
    before_update(total := _from_last_stage(losses, ()))
    engine.step()  # also reduces: with managed_gradient_accumulation the backward passes do not
    return total


@torch.no_grad()
def evaluate(
    engine: Engine | torch.nn.Module, batches: Sequence[Batch], forward: Forward, sums_fn: Reduce, size: int
) -> torch.Tensor:
    """The sum of `sums_fn` over micro-batches, [size] float64, on all ranks that hold the model.

    Args:
        engine: or the model alone, without DeepSpeed.
    """
    was_training = engine.training
    engine.eval()
    if _stages() == 1:
        total = torch.stack([sums_fn(forward(engine, batch), batch) for batch in _on_device(batches)]).sum(0)
    else:
        rounds = -(-len(batches) // _stages()) if _is_interleaved() else 0  # whose schedule has whole ones
        more = rounds * _stages() - len(batches)
        sums = _run_pipeline(
            engine,
            [*batches, *([batches[0]] * more)],
            forward,
            lambda output, batch: (output.sum(), sums_fn(output, batch)),
            forward_only=True,
        )
        total = _from_last_stage(sums[: len(batches)], (size,))
    engine.train(was_training)
    return total


def _one_or_nan(losses: Sequence[torch.Tensor], max_loss: float | None) -> torch.Tensor:
    """The factor of the most recent loss of a step: NaN makes the gradients NaN, so that DeepSpeed skips the step.

    If `max_loss` is given, the factor is NaN when the sum of all replicas' losses exceeds it; no host synchronisation.
    """
    if max_loss is None:
        return losses[-1] * 0 + 1  # NaN if the loss is not finite, even if its gradient would be
    total = torch.stack(list(losses)).double().sum()
    dist.all_reduce(total, group=replicas())
    return torch.where(total <= max_loss, 1.0, torch.nan).to(losses[-1])


def _on_device(batches: Sequence[Batch]) -> Iterator[Batch]:
    """The batches on this rank's device; each is sent before the one before it is used, and the host never waits."""
    copies = ({name: to_device(tensor) for name, tensor in batch.items()} for batch in batches)
    return (batch for batch, _ahead in pairwise(chain(copies, [{}])))


def _stages() -> int:
    return parallel_state.get_pipeline_model_parallel_world_size()


def _is_interleaved() -> bool:
    return parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None


def _run_pipeline(
    engine: Engine | torch.nn.Module,
    batches: Sequence[Batch],
    forward: Forward,
    loss_and_recorded: Callable[[torch.Tensor, Batch], tuple[torch.Tensor, torch.Tensor]],
    forward_only: bool = False,
) -> list[torch.Tensor]:
    """Run Megatron's schedule; returns what `loss_and_recorded` records per micro-batch, on the last stage only."""

    def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        batch = next(iterator)
        return forward(model, batch), lambda output: loss_and_recorded(output, batch)

    rows, length = batches[0]["tokens"].shape
    parts = parts_of(getattr(engine, "module", engine))
    iterators = [_on_device(batches) for _ in parts]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if _is_interleaved() else iterators[0],
        model=parts if _is_interleaved() else parts[0],
        num_microbatches=len(batches),
        seq_length=length * parallel_state.get_context_parallel_world_size(),
        micro_batch_size=rows,
        forward_only=forward_only,
    )


def _from_last_stage(recorded: list[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """The sum of what the last stage has recorded, float64, on all stages."""
    device = torch.cuda.current_device()
    total = (
        torch.stack(recorded).double().sum(0) if recorded else torch.zeros(shape, dtype=torch.float64, device=device)
    )
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(total, last, group=parallel_state.get_pipeline_model_parallel_group())
    return total
