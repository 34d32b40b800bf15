"""All-to-all that is waited for later than it is started, forward and backward.

    flight = Flight(group, sent, received)
    flight.depart(rows, gates)              # starts
    ...                                     # other work
    rows, gates = flight.arrive()           # waits

Autograd goes the same way back: the backward pass of `arrive` starts the all-to-all of the gradients, and that of
`depart` waits for it. What lies between the two in the forward pass lies between them in the backward pass too, since
autograd takes the last operators first. On CUDA the collectives have a stream of their own, which waits for what the
current stream was given before `depart`, and for which the current stream waits in `arrive`.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Flight:
    """One exchange of rows between the ranks of a group.

    Args:
        sent, received: number of rows to and from each rank.
    """

    def __init__(self, group: dist.ProcessGroup, sent: Sequence[int], received: Sequence[int]) -> None:
        self._group, self._sent, self._received = group, list(sent), list(received)
        self._works: list[dist.Work] = []
        self._held: list[Tensor] = []  # what is sent, which must stay as it is until it has arrived
        self.arriving: tuple[Tensor, ...] = ()  # not to be read before `wait`
        self.homeward: Flight  # of the gradients

    def back(self) -> "Flight":
        """A flight of as many rows in the other direction."""
        return Flight(self._group, self._received, self._sent)

    def depart(self, *tensors: Tensor) -> None:
        """Start; each tensor has [M, ...] for the M rows that are sent."""
        self.arriving = _Depart.apply(self, *tensors)

    def arrive(self) -> tuple[Tensor, ...]:
        """Wait; the rows of all other ranks, in the order of the ranks."""
        tensors, self.arriving = self.arriving, ()
        return _Arrive.apply(self, *tensors)

    def start(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Start without autograd: `arriving`."""
        arriving = self.arriving = tuple(tensor.new_empty(sum(self._received), *tensor.shape[1:]) for tensor in tensors)
        self._held = [tensor.contiguous() for tensor in tensors]
        sizes = self._received, self._sent
        for into, held in zip(arriving, self._held, strict=True):
            work = dist.all_to_all_single(into, held, *sizes, group=self._group, async_op=True)
            assert work is not None
            self._works.append(work)
        return arriving

    def wait(self) -> None:
        """Wait for what `start` started."""
        for work in self._works:
            work.wait()
        self._works, self._held = [], []


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, flight: Flight, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        return flight.start(tensors)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        homeward = ctx.flight.homeward
        homeward.wait()
        return None, *homeward.arriving


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, flight: Flight, *tensors: Tensor) -> tuple[Tensor, ...]:
        flight.wait()
        ctx.flight = flight
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        homeward = ctx.flight.homeward = ctx.flight.back()
        homeward.start(gradients)
        # What is under way goes by the flight: autograd would not accept the shapes of what was sent.
        return None, *gradients
