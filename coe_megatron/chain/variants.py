"""Variants of the chain that are not in the paper: methods that the oracle and the layer both call.

    x(t) = a_t ⊙ F_t(c_t ⊙ x(t-1)) + r(t)       a_t ⊙ F_t replaces F_t in Δ too
    a_t                                         a learned gain [D] (`learned_scale`)
    c_t                                         a learned gain [D] (`conditioned`), or
    c_t = 1 + W2_t silu(W1 x(t-1))              of the token and the iteration (`modulation_rank`)
    logit[t,i] = -inf if i was chosen before    a token visits an expert once (`no_return`)
    X(t) = R_t X(t-1) + o_t F_t(i_t · X(t-1))   n streams X [n, D] (`streams`), see `state`
    z(0) = W_down u, Δ = W_up Σ_t F_t(z(t-1))   the chain iterates in L dimensions (`latent`)

`chain.method` and `model.layer` call the same methods. A new variant changes what they return, and needs a field of
ChainSettings and its cost in `coe_megatron.estimate`.

T: tokens, N: experts, D: hidden, or L with `latent`, C: iterations, n: streams, r: rank.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from coe_megatron.chain.settings import ChainSettings


class Variants(nn.Module):
    """The way into and out of a chain, an iteration's input, its increment, and the experts masked in the next one.

    Parameters:
        increment_gains: a_t, [D] each; C of them with `learned_scale`, which start at its value, else none.
        state_gains: c_t, [D] each; C of them with `conditioned`, which start at 1, else none.
        modulation_down, modulation_up: W1 [r, D], and C of W2_t [D, r], which start at 0; none without.
        stream_weights: i_t [n], o_t [n] and R_t [n, n] in one vector, which has no weight decay; C of them with
            `streams`, else none. They start as the plain chain: i_t is 1 for one stream, another one in each iteration,
            o_t is 1 and R_t the identity.
        latent_down, latent_up: W_down [L, hidden], W_up [hidden, L]; None without `latent`.
    """

    def __init__(self, chain: ChainSettings, hidden: int) -> None:
        super().__init__()
        width, steps = chain.width(hidden), range(chain.iterations)

        def gains(start: float | None) -> nn.ParameterList:
            return nn.ParameterList(torch.full((width,), float(start or 0)) for _ in steps if start is not None)

        self.no_return, self.streams = chain.no_return, chain.streams
        self.increment_gains = gains(chain.learned_scale)
        self.state_gains = gains(1.0 if chain.conditioned else None)
        rank, n = chain.modulation_rank, chain.streams or 0
        self.modulation_down = None if rank is None else _matrix(rank, width)
        self.modulation_up = nn.ParameterList(torch.zeros(width, rank) for _ in steps if rank is not None)
        starts = (torch.cat([torch.eye(n)[t % n], torch.ones(n), torch.eye(n).flatten()]) for t in steps if n)
        self.stream_weights = nn.ParameterList(starts)
        self.latent_down = None if chain.latent is None else _matrix(width, hidden)
        self.latent_up = None if chain.latent is None else _matrix(hidden, width)

    def enter(self, u: Tensor) -> Tensor:
        """x(0) [..., D] of the input of the sub-layer: itself, or W_down u."""
        return u if self.latent_down is None else functional.linear(u, self.latent_down)

    def leave(self, delta: Tensor) -> Tensor:
        """What the sub-layer adds, of Δ [..., D]: itself, or W_up Δ."""
        return delta if self.latent_up is None else functional.linear(delta, self.latent_up)

    def iteration_input(self, t: int, x: Tensor) -> Tensor:
        """c_t ⊙ x(t-1) [..., D]: input of router and experts in iteration t (from 0)."""
        if self.modulation_down is not None:
            inner = functional.silu(functional.linear(x, self.modulation_down))
            return (1 + functional.linear(inner, self.modulation_up[t])) * x
        return self.state_gains[t] * x if len(self.state_gains) else x

    def increment(self, t: int, f: Tensor) -> Tensor:
        """a_t ⊙ F_t [..., D]: increment of iteration t (from 0)."""
        return self.increment_gains[t] * f if len(self.increment_gains) else f

    def state(self, start: Tensor, increments: Sequence[Tensor]) -> Tensor:
        """What the next iteration reads of n streams, or their mean after the last: [..., D].

        X(0) is n times x(0). Mixing is linear and static, so each stream is a sum of x(0) and the increments F_s times
        a number of its own: streams need no memory, only these tensors. It also means that n streams can do no more
        than learn these numbers.

        Args:
            start: x(0).
            increments: F_1 .. F_t.
        """
        done, factors = len(increments), self._stream_factors(len(increments))
        is_last = done == len(self.stream_weights)
        read = factors.mean(0) if is_last else self._stream_matrices(done)[0] @ factors
        return _weighted(read, [start, *increments])

    def total(self, increments: Sequence[Tensor]) -> Tensor:
        """Δ_t of n streams: the mean over streams of what F_1 .. F_t have written into them, [..., D]."""
        return _weighted(self._stream_factors(len(increments)).mean(0)[1:], increments)

    def masked(self, before_TN: Tensor | None, chosen_TN: Tensor) -> Tensor | None:
        """Experts masked in the next iteration, bool [T, N]; None for none.

        Args:
            before_TN: experts masked in this iteration; None for none.
            chosen_TN: bool, experts that processed the tokens in this iteration.
        """
        if not self.no_return:
            return None
        return chosen_TN if before_TN is None else before_TN | chosen_TN

    def _stream_matrices(self, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """i_t [n], o_t [n] and R_t [n, n] of iteration t (from 0), at least float32."""
        assert self.streams is not None
        weights = self.stream_weights[t]
        wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
        read, write, mix = wide.split([self.streams, self.streams, self.streams**2])
        return read, write, mix.view(self.streams, self.streams)

    def _stream_factors(self, t: int) -> Tensor:
        """The factors of x(0), F_1 .. F_t in each stream of X(t), [n, t + 1]."""
        factors = torch.ones_like(self._stream_matrices(0)[0]).unsqueeze(1)
        for _, write, mix in map(self._stream_matrices, range(t)):
            factors = torch.cat([mix @ factors, write.unsqueeze(1)], dim=1)
        return factors


def _matrix(rows: int, columns: int) -> nn.Parameter:
    """A matrix whose products are as large as what it is multiplied with."""
    return nn.Parameter(torch.randn(rows, columns) / math.sqrt(columns))


def _weighted(weights: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors times their weights, from the first on: ones give the bits of a plain sum."""
    first, *rest = (weight * tensor for weight, tensor in zip(weights, tensors, strict=True))
    return sum(rest, start=first)
