"""Which replica gets which sample, and which rank which tokens, by the code that hands them out in a run."""

from collections import Counter
from collections.abc import Iterator
from math import ceil

import numpy as np
import torch

from coe_megatron.data.datasets import StepBatches, validation_batches
from coe_megatron.data.folders import training_parts
from coe_megatron.data.samples import Sample
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.sequence_parts import PartOfSamples

_STEPS = 6  # on as many replicas as the run has for the first half, then on another number
_EPOCH = 2.5  # steps: an epoch ends within the third and after the fifth
_LOOKED_AT = 16  # replicas whose batches are made, besides the order of all


class _Numbered:
    """Samples whose only token says which sample of which corpus it is."""

    def __init__(self, corpus: int, size: int) -> None:
        self._corpus, self._size = corpus, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Sample:
        ones = {"loss_mask": torch.ones(1), "padding_mask": torch.zeros(1, dtype=torch.bool)}
        return {"tokens": torch.tensor([self._corpus, index]), **ones}


def check_training_order(run: RunShape) -> list[int]:
    """Check that every sample goes to one replica once per epoch, also after a resume on another number of replicas.

    Returns:
        Both numbers of replicas.

    Raises:
        ConfigError: a sample is left out or repeated.
    """
    parts, batch = training_parts(run.config.data), run.config.training.global_batch
    weights = [part.weight for part in parts]
    sizes = [max(1, ceil(_EPOCH * batch * weight / sum(weights))) for weight in weights]
    replicas = [run.layout.data, _other_number(run)]
    orders = [_step_batches(run, sizes, weights, 0, each) for each in replicas]
    seen: list[list[int]] = [[] for _ in parts]
    for step in range(_STEPS):
        later = step >= _STEPS // 2
        rows = orders[later].rows(step)
        for corpus, index in rows.reshape(-1, 2).tolist():
            seen[corpus].append(index)
        for replica in _some(replicas[later]):
            own = _step_batches(run, sizes, weights, replica, replicas[later]).for_step(step)
            if not np.array_equal(torch.stack([each["tokens"] for each in own]).numpy(), rows[:, replica]):
                raise ConfigError(f"samples: replica {replica} of step {step} gets others than its part of the order")
    for corpus, (size, indices) in enumerate(zip(sizes, seen, strict=True)):
        for first in range(0, len(indices), size):
            _require_once(
                Counter(indices[first : first + size]), size, len(indices) >= first + size, parts[corpus].path
            )
    return replicas


def _require_once(found: Counter[int], size: int, complete: bool, corpus: str) -> None:
    twice = next((index for index, times in found.items() if times > 1), None)
    if twice is not None:
        raise ConfigError(f"samples: sample {twice} of {corpus} goes to {found[twice]} replicas in an epoch")
    if complete and found.keys() != set(range(size)):
        missing = min(set(range(size)) - found.keys())
        raise ConfigError(f"samples: sample {missing} of {corpus} goes to no replica in an epoch")


def _step_batches(run: RunShape, sizes: list[int], weights: list[float], replica: int, replicas: int) -> StepBatches:
    training = run.config.training
    corpora = [_Numbered(corpus, size) for corpus, size in enumerate(sizes)]
    return StepBatches(
        corpora,
        weights,
        seed=training.order_seed,
        global_batch=training.global_batch,
        micro_batch=training.micro_batch,
        dp_rank=replica,
        dp_size=replicas,
    )


def _other_number(run: RunShape) -> int:
    """Half as many replicas, else twice as many, else one."""
    replicas, rows = run.layout.data, run.config.training.global_batch // run.config.training.micro_batch
    if replicas % 2 == 0:
        return replicas // 2
    return 2 * replicas if rows % (2 * replicas) == 0 else 1


def _some(replicas: int) -> Iterator[int]:
    """Replicas at equal distances, the first and the last among them."""
    count = min(_LOOKED_AT, replicas)
    yield from sorted({(replicas - 1) * number // max(1, count - 1) for number in range(count)})


def check_validation(run: RunShape) -> int:
    """Check that every sample of a validation set goes to one replica, although they do not divide; their number.

    Raises:
        ConfigError: a sample is left out or repeated.
    """
    replicas, micro_batch = run.layout.data, run.config.training.micro_batch
    count = replicas * micro_batch + 1
    found: Counter[int] = Counter()
    for replica in range(replicas):
        for batch in validation_batches(_Numbered(0, count), micro_batch, replica, replicas):
            found.update(batch["tokens"][batch["loss_mask"][:, 0] > 0, 1].tolist())
    _require_once(found, count, True, "the validation set")
    return count


def check_tokens(run: RunShape) -> None:
    """Check that the ranks that share a sequence have each of its tokens once.

    Raises:
        ConfigError: a token is left out or repeated.
    """
    length, ranks = run.config.model.seq_length, run.layout.context
    whole = [{"tokens": torch.arange(length)}]
    held = [PartOfSamples(whole, rank, ranks)[0]["tokens"] for rank in range(ranks)]
    if not torch.equal(torch.cat(held).sort().values, whole[0]["tokens"]):
        raise ConfigError(f"samples: the {ranks} ranks that share a sequence do not have each of its tokens once")
