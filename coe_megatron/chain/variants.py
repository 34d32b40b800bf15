"""Variants of the chain that are not in the paper: three methods that every iteration calls.

    x(t) = a_t ⊙ F_t(c_t ⊙ x(t-1)) + r(t)     a_t ⊙ F_t replaces F_t in Δ too
    a_t                                       a learned gain [D] (`learned_scale`)
    c_t                                       a learned gain [D] (`conditioned`)
    logit[t,i] = -inf if i was chosen before  a token visits an expert once (`no_return`)

`chain.method` and `model.layer` call the same three methods. A new variant changes what they return, and needs a field
of ChainSettings and its cost in `coe_megatron.estimate`.

T: tokens, N: experts, D: hidden.
"""

import torch
from torch import Tensor, nn

from coe_megatron.chain.settings import ChainSettings


class Variants(nn.Module):
    """Input of an iteration, its increment, and the experts masked in the next iteration.

    Parameters:
        increment_gains: a_t, [D] each; C of them with `learned_scale`, which start at its value, else none.
        state_gains: c_t, [D] each; C of them with `conditioned`, which start at 1, else none.
    """

    def __init__(self, chain: ChainSettings, hidden: int) -> None:
        super().__init__()

        def gains(start: float | None) -> nn.ParameterList:
            count = 0 if start is None else chain.iterations
            return nn.ParameterList(torch.full((hidden,), float(start or 0)) for _ in range(count))

        self.no_return = chain.no_return
        self.increment_gains = gains(chain.learned_scale)
        self.state_gains = gains(1.0 if chain.conditioned else None)

    def iteration_input(self, t: int, x: Tensor) -> Tensor:
        """c_t ⊙ x(t-1) [..., D]: input of router and experts in iteration t (from 0)."""
        return self.state_gains[t] * x if len(self.state_gains) else x

    def increment(self, t: int, f: Tensor) -> Tensor:
        """a_t ⊙ F_t [..., D]: increment of iteration t (from 0)."""
        return self.increment_gains[t] * f if len(self.increment_gains) else f

    def masked(self, before_TN: Tensor | None, chosen_TN: Tensor) -> Tensor | None:
        """Experts masked in the next iteration, bool [T, N]; None for none.

        Args:
            before_TN: experts masked in this iteration; None for none.
            chosen_TN: bool, experts that processed the tokens in this iteration.
        """
        if not self.no_return:
            return None
        return chosen_TN if before_TN is None else before_TN | chosen_TN
