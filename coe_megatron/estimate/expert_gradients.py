"""Closed form of the memory for gradients in the backward pass of one MoE layer's experts.

Follows `local_backend/expert_mlp.py`: rows that are few beside the weights are kept, so that one product makes the
weight gradient of several iterations. Does not import torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertUse:
    """What one iteration gives the experts of a rank, in elements.

    Attributes:
        rows: number of rows, one per token and expert.
        tokens: number of tokens that the rows are gathered from.
        hidden, inner, ffn: widths of a token, of the first product, and of the activation.
        first, second: elements of the two weights of all experts.
        recomputed: whether the backward pass computes the activation again.
    """

    rows: int
    tokens: int
    hidden: int
    inner: int
    ffn: int
    first: int
    second: int
    recomputed: bool

    @property
    def given(self) -> int:
        """Elements that an iteration gives to the weight gradients."""
        return self.rows * (self.inner + self.ffn) + self.tokens * self.hidden

    def in_one_product(self, iterations: int) -> int:
        """The number of iterations whose weight gradients are made in one product."""
        return min(iterations, (self.first + self.second) // 2 // max(1, self.given) + 1)


def expert_gradients(use: ExpertUse, iterations: int, freed: int) -> int:
    """Elements at the maximum, in addition to everything that the forward pass has kept.

    Args:
        freed: elements that one iteration's backward pass frees, without the tokens and the activation of its rows.
    """
    together, sums = use.in_one_product(iterations), use.first + use.second
    row_gradients = use.rows * max(4 * use.ffn, use.hidden + use.inner)
    rows, tokens = together * use.rows, together * use.tokens
    held = rows * (use.inner + use.ffn * use.recomputed) + tokens * use.hidden
    if together == 1:
        # An iteration's first gradient is made before it is added to the sum, when what later iterations kept is freed.
        again = max(0, use.first - freed) if iterations > 1 else 0
        return max(row_gradients, held + rows * use.hidden) + sums + again
    first = (rows * (use.inner + use.hidden) + tokens * use.hidden) + use.first
    second = use.first + rows * (use.hidden + use.ffn) + use.second
    # While one more iteration goes backward, or after all of them.
    passed = together - 1 if together * use.given > sums // 2 else together
    moments = [row_gradients, held + max(first, second) - passed * freed]
    if together < iterations:
        moments.append(sums + held + first - (together + passed) * freed)
    return max(moments)
