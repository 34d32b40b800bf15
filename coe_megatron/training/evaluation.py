"""The validation loss, and the unigram entropy: the best loss of a model that ignores context."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from coe_megatron.distributed import process_groups
from coe_megatron.distributed.collectives import start_sum
from coe_megatron.errors import ConfigError
from coe_megatron.zero import train_step
from coe_megatron.zero.engine import Engine
from coe_megatron.zero.train_step import Batch


def forward(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Run this rank's pipeline stage: returns the loss of every token [B, S], or hidden states if a stage follows.

    The losses at padding are meaningless, and no auxiliary loss counts padding.

    Args:
        batch: tokens, labels, position_ids [B, S] int64 and padding_mask [B, S] bool, True at padding; optionally
            attention_mask [B, 1, S, S] bool, True where attention is forbidden, instead of the causal mask. With
            context parallelism S / CP of each, and [B, 1, S / CP, S].
    """
    padding = batch["padding_mask"]
    if not model.pre_process:  # with the embedding GPTModel itself takes this rank's part of the sequence
        tensor = parallel_state.get_tensor_model_parallel_group()
        padding = padding.chunk(tensor.size(), dim=1)[tensor.rank()]
    masks = {"labels": batch["labels"], "padding_mask": padding}
    return model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"), **masks)


def masked_loss_sum(token_losses: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum of the token losses [B, S] over the loss mask, fp32."""
    return (token_losses.float() * batch["loss_mask"]).sum()


@dataclass(frozen=True)
class ValidationSet:
    """This rank's shard of a fixed set of samples; every rank has the same number of batches.

    Attributes:
        batches: in CPU memory.
        bytes_per_token: average over the text of the set; None if the text is not known.
    """

    batches: Sequence[Batch]
    bytes_per_token: float | None


@dataclass(frozen=True)
class SetLoss:
    """The loss of a validation set on all ranks.

    Attributes:
        nats: sum over the counted tokens.
        tokens: number of counted tokens.
        bytes: of the text of these tokens, by the set's average; NaN if that is unknown.
    """

    nats: float
    tokens: float
    bytes: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, which does not depend on the tokenizer; NaN if the bytes are unknown."""
        return self.nats / math.log(2) / self.bytes

    def values(self) -> dict[str, float]:
        """`loss`, and `bits_per_byte` if it is known."""
        known = {} if math.isnan(self.bytes) else {"bits_per_byte": self.bits_per_byte}
        return {"loss": self.loss, **known}

    def __add__(self, other: "SetLoss") -> "SetLoss":
        return SetLoss(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)


def set_losses(engine: Engine | torch.nn.Module, sets: Mapping[str, ValidationSet]) -> dict[str, SetLoss]:
    """The loss of each set over the unmasked tokens of all ranks; collective.

    Raises:
        ConfigError: the loss mask of a set is zero everywhere.
    """
    sums = {name: _sums(engine, part.batches) for name, part in sets.items()}
    for name, (_, tokens) in sums.items():
        if not tokens:
            raise ConfigError(f"validation set {name} has no token to compute a loss on: prepare more validation text")
    return {
        name: SetLoss(nats, tokens, tokens * (sets[name].bytes_per_token or math.nan))
        for name, (nats, tokens) in sums.items()
    }


def validate(engine: Engine, sets: Mapping[str, ValidationSet]) -> dict[str, Any]:
    """Validation losses over the unmasked tokens of all ranks.

    Returns:
        `valid_loss` in nats per token and `valid_bits_per_byte` over all sets together; if there are several sets, also
        `valid`: name -> `loss` and `bits_per_byte` of each set. Bits per byte are left out where a text is not known.

    Raises:
        ConfigError: the loss mask of a set is zero everywhere.
    """
    losses = set_losses(engine, sets)
    together = sum(losses.values(), SetLoss(0.0, 0.0, 0.0))
    values: dict[str, Any] = {f"valid_{name}": value for name, value in together.values().items()}
    if len(sets) > 1:
        values["valid"] = {name: found.values() for name, found in losses.items()}
    return values


def progress_losses(values: Mapping[str, Any]) -> dict[str, float]:
    """The losses for the progress line, from the result of `validate`."""
    return {"valid": values["valid_loss"], **{name: part["loss"] for name, part in values.get("valid", {}).items()}}


def _sums(engine: Engine | torch.nn.Module, batches: Sequence[Batch]) -> tuple[float, float]:
    """Sum of the loss in nats and number of unmasked tokens, over all ranks."""

    def sums_of(token_losses: torch.Tensor, batch: Batch) -> torch.Tensor:
        return torch.stack([masked_loss_sum(token_losses, batch), batch["loss_mask"].sum()]).double()

    nats, tokens = replica_sum(train_step.evaluate(engine, batches, forward, sums_of, size=2)).tolist()
    return nats, tokens


def unigram_entropy(batches: Iterable[Batch], vocab_size: int) -> float:
    """Entropy in nats of the frequencies of unmasked labels: the best loss of a model that ignores context."""
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    for batch in batches:
        labels = batch["labels"][batch["loss_mask"] > 0]
        counts += torch.bincount(labels, minlength=vocab_size).double()
    shares = replica_sum(counts).cpu()
    shares = shares[shares > 0] / shares.sum()
    return -float((shares * shares.log()).sum())


def replica_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over the replicas of the model, on this rank's device; on CUDA the host does not wait for it."""
    return start_sum(values, process_groups.replicas()).result()
