"""Which part of a sequence a rank has under context parallelism.

A sequence is cut into 2 CP equal chunks, and rank r of CP has chunks r and 2 CP - 1 - r. A chunk attends to itself and
to those before it, so that both together attend to 2 CP + 1 chunks on every rank. Megatron's rotary embedding takes the
same parts.
"""

from typing import Any

import torch


def chunks_of(rank: int, ranks: int) -> tuple[int, int]:
    """The two chunks of a rank, of `2 * ranks`."""
    return rank, 2 * ranks - 1 - rank


def own_part(whole: torch.Tensor, dim: int, rank: int, ranks: int) -> torch.Tensor:
    """A rank's part of a tensor that has the whole sequence S along `dim`: S / ranks there."""
    chunks = whole.chunk(2 * ranks, dim)
    return torch.cat([chunks[number] for number in chunks_of(rank, ranks)], dim)


def in_order(parts: torch.Tensor, ranks: int) -> torch.Tensor:
    """The whole sequence [S, ...] of the parts of all ranks, one after the other along the first dimension."""
    early_late = parts.unflatten(0, (ranks, 2, -1))
    return torch.cat([early_late[:, 0], early_late[:, 1].flip(0)]).flatten(0, 1)


class PartOfSamples:
    """A rank's part of every sample of a source.

    Args:
        source: of `data.samples`; only `len` and indices are used.
    """

    def __init__(self, source: Any, rank: int, ranks: int) -> None:
        self._source, self._rank, self._ranks = source, rank, ranks

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self._source[index]
        # All have the shape [S], but the attention mask [1, S, S]: a rank needs the rows of its own queries.
        dims = {name: 1 if name == "attention_mask" else 0 for name in sample}
        return {name: own_part(tensor, dims[name], self._rank, self._ranks) for name, tensor in sample.items()}
