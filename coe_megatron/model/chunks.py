"""Chunks of tokens on their way through a chain, in turns: one goes on while what another has sent is under way.

S: sequence, B: micro-batch, T = S * B tokens of a chunk, D: hidden size, N: experts.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch

from coe_megatron.model.chain_probe import ChainProbe
from coe_megatron.model.recompute import RoutingRecord
from coe_megatron.model.router import Routing

Result = TypeVar("Result")
Steps = Generator[None, None, Result]


def in_turns(generators: Sequence[Steps[Result]]) -> list[Result]:
    """Run all to their ends, each to its next `yield` before the next one's turn; what they return, in their order."""
    results: dict[int, Result] = {}
    while len(results) < len(generators):
        for number, generator in enumerate(generators):
            if number in results:
                continue
            try:
                next(generator)
            except StopIteration as end:
                results[number] = end.value
    return [results[number] for number in range(len(generators))]


class Iteration(NamedTuple):
    """Result of iteration t.

    Attributes:
        increment: a_t F_t(c_t x(t-1)), [S, B, D].
        routing: its gates and choices [T, N].
    """

    increment: torch.Tensor
    routing: Routing


class Pass(NamedTuple):
    """What an iteration is given of a chunk.

    Attributes:
        state: x(t-1), [S, B, D].
        padding_mask: [S, B] bool.
        record: the routing to use, or to fill in; None if there will be no second pass.
        masked_TN: bool [T, N], experts that tokens must not choose; None for none.
        reused: the routing to use (`fixed`); None to route.
    """

    state: torch.Tensor
    padding_mask: torch.Tensor | None
    record: RoutingRecord | None
    masked_TN: torch.Tensor | None
    reused: Routing | None


@dataclass
class Chunk:
    """A part of the tokens (all, if there is one) on its way through the chain.

    Attributes:
        start, state, delta: x(0), x(t) and the sum of increments, [S, B, D]; the first iteration replaces delta.
        records: of the iterations.
        probe: to notify; None in evaluation and recomputation.
        logits: of the routers so far, if losses are owed for them.
        increments: F_1 .. F_t, if there are streams.
    """

    start: torch.Tensor
    state: torch.Tensor
    delta: torch.Tensor
    padding_mask: torch.Tensor | None
    records: list[RoutingRecord | None]
    probe: ChainProbe | None
    masked_TN: torch.Tensor | None = None
    reused: Routing | None = None
    logits: list[torch.Tensor] = field(default_factory=list)
    increments: list[torch.Tensor] = field(default_factory=list)

    def next_pass(self, t: int) -> Pass:
        """What iteration t is given."""
        return Pass(self.state, self.padding_mask, self.records[t], self.masked_TN, self.reused)
