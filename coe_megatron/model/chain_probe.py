"""What the C iterations of one layer do to its tokens, as sums; taken on steps whose metrics are logged only.

T: tokens, D: hidden size, N: experts, C: iterations. Padding counts in nothing.
"""

from functools import partial

import torch


class ChainProbe:
    """Follows the tokens of a layer through its iterations.

    Attributes:
        sums: [C, 6] float64, over this rank's counted tokens since the probe was made: tokens, their copies that
            reached an expert, the copies among these whose expert the token had been at in an earlier iteration, and
            the squared norms of x(t-1), F_t (times its gain, if it has one) and x(t).
        pairs: [C, N, N] float64: how often a token reached expert i in the iteration before and expert j in this one;
            None where `experts` is.

    Args:
        experts: N, if pairs of experts are to be counted.
    """

    def __init__(self, iterations: int, experts: int | None = None) -> None:
        zeros = partial(torch.zeros, iterations, dtype=torch.float64, device=torch.cuda.current_device())
        self.sums = zeros(6)
        self.pairs = None if experts is None else zeros(experts, experts)
        self._visited_TN: torch.Tensor | None = None
        self._before_TN: torch.Tensor | None = None

    @torch.no_grad()
    def record(
        self,
        t: int,
        visits_TN: torch.Tensor,
        before: torch.Tensor,
        increment: torch.Tensor,
        after: torch.Tensor,
        padding: torch.Tensor | None,
    ) -> None:
        """Add iteration t (from 0) of one micro-batch; the iterations of a pass come in their order.

        Args:
            visits_TN: bool, the experts that each token reaches.
            before, increment, after: x(t-1), F_t and x(t), [S, B, D] with S * B = T.
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
        norms = [_squared_norm(hidden, counted_T) for hidden in (before, increment, after)]
        self.sums[t] += torch.stack([counted_T.sum(), visits_TN.sum(), repeated, *norms])


def _squared_norm(hidden: torch.Tensor, counted_T: torch.Tensor) -> torch.Tensor:
    """Sum of squares over the counted tokens of [S, B, D]; tokens are added up in float64."""
    norms_T = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32).flatten().double()
    return (norms_T.square() * counted_T).sum()
