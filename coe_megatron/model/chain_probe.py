"""What the C iterations of one layer do to its tokens, as sums; taken on steps whose metrics are logged only.

T: tokens, D: hidden size, N: experts, C: iterations. Padding counts in nothing.
"""

from functools import partial

import torch
from torch.nn.functional import cosine_similarity


class ChainProbe:
    """Follows the tokens of a layer through its iterations.

    Attributes:
        sums: [C, 9] float64, over this rank's counted tokens since the probe was made: tokens, their copies that
            reached an expert, the copies among these whose expert the token had been at in an earlier iteration, the
            squared norms of x(t-1), F_t (times its gain, if it has one), x(t), F_1 and Δ_t, and the product F_1 · Δ_t,
            where Δ_t is what t iterations add to their input.
        cosines: [C, C] float64, in row t and column s < t the sum of cos(F_s, F_t) over the same tokens.
        pairs: [C, N, N] float64: how often a token reached expert i in the iteration before and expert j in this one;
            None where `experts` is.

    Args:
        experts: N, if pairs of experts are to be counted.
    """

    def __init__(self, iterations: int, experts: int | None = None) -> None:
        zeros = partial(torch.zeros, iterations, dtype=torch.float64, device=torch.cuda.current_device())
        self.sums, self.cosines = zeros(9), zeros(iterations)
        self.pairs = None if experts is None else zeros(experts, experts)
        self._visited_TN: torch.Tensor | None = None
        self._before_TN: torch.Tensor | None = None
        self._increments: list[torch.Tensor] = []

    @torch.no_grad()
    def record(
        self,
        t: int,
        visits_TN: torch.Tensor,
        before: torch.Tensor,
        increment: torch.Tensor,
        after: torch.Tensor,
        delta: torch.Tensor,
        padding: torch.Tensor | None,
    ) -> None:
        """Add iteration t (from 0) of one micro-batch; the iterations of a pass come in their order.

        Args:
            visits_TN: bool, the experts that each token reaches.
            before, increment, after, delta: x(t-1), F_t, x(t) and Δ_t, [S, B, D] with S * B = T.
            padding: [S, B] bool, True at padding.
        """
        counted_T = torch.ones_like(visits_TN[:, 0]) if padding is None else ~padding.flatten()
        visits_TN = visits_TN & counted_T.unsqueeze(1)
        if t == 0 or self._visited_TN is None:
            self._visited_TN = torch.zeros_like(visits_TN)
        elif self.pairs is not None and self._before_TN is not None:
            self.pairs[t] += self._before_TN.T.float() @ visits_TN.float()
        self._before_TN = visits_TN
        repeated = (visits_TN & self._visited_TN).sum()
        self._visited_TN = self._visited_TN | visits_TN
        earlier = self._increments[:t]
        first = earlier[0] if earlier else increment
        norms = [_squared_norm(hidden, counted_T) for hidden in (before, increment, after, first, delta)]
        product = (torch.linalg.vecdot(first.float(), delta.float()).flatten().double() * counted_T).sum()
        self.sums[t] += torch.stack([counted_T.sum(), visits_TN.sum(), repeated, *norms, product])
        for s, other in enumerate(earlier):
            cosines = cosine_similarity(other.float(), increment.float(), dim=-1)
            self.cosines[t, s] += (cosines.flatten().double() * counted_T).sum()
        self._increments = [*earlier, increment] if t + 1 < len(self.sums) else []


def _squared_norm(hidden: torch.Tensor, counted_T: torch.Tensor) -> torch.Tensor:
    """Sum of squares over the counted tokens of [S, B, D]; tokens are added up in float64."""
    norms_T = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32).flatten().double()
    return (norms_T.square() * counted_T).sum()
