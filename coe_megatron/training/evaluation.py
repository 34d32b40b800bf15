"""The validation loss, and the entropy a model has to beat to have learned anything but frequencies."""

from collections.abc import Iterable

import torch
from megatron.core import parallel_state

Batch = dict[str, torch.Tensor]


def token_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Loss of every token [B, S] in fp32; padding holds values of no meaning and is not counted in any auxiliary loss.

    Args:
        batch: tokens, labels, position_ids [B, S] int64 and padding_mask [B, S] bool, True at padding; maybe
            attention_mask [B, 1, S, S] bool, True where attention is forbidden, in place of the causal mask.
    """
    masks = {"labels": batch["labels"], "padding_mask": batch["padding_mask"]}
    return model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"), **masks).float()


@torch.no_grad()
def validation_loss(model: torch.nn.Module, batches: Iterable[Batch]) -> float:
    """Mean loss in nats over all counted tokens of all ranks' batches; every rank has to bring equally many.

    Raises:
        ValueError: no token counts in any batch.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    for batch in batches:
        mask = batch["loss_mask"]
        sums += torch.stack([(token_losses(model, batch) * mask).sum(), mask.sum()])
    model.train(was_training)
    total, tokens = all_reduce_sum(sums).tolist()
    if not tokens:
        raise ValueError("the validation set holds no token to compute a loss on: prepare the data with more of it")
    return total / tokens


def unigram_entropy(batches: Iterable[Batch], vocab_size: int) -> float:
    """Entropy in nats of the counted labels' frequencies: the best loss of a model that ignores context."""
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    for batch in batches:
        labels = batch["labels"][batch["loss_mask"] > 0]
        counts += torch.bincount(labels, minlength=vocab_size).double().cpu()
    shares = all_reduce_sum(counts)
    shares = shares[shares > 0] / shares.sum()
    return -float((shares * shares.log()).sum())


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over the data-parallel ranks, as a CPU tensor of the same dtype."""
    moved = values.to(torch.cuda.current_device())
    torch.distributed.all_reduce(moved, group=parallel_state.get_data_parallel_group())
    return moved.cpu()
