"""What one router saw in a step, as sums; `routing_stats` reads them.

S: sequence, B: micro-batch, T = S * B tokens, N: experts.
"""

from dataclasses import dataclass, field

import torch


@dataclass
class RouterStats:
    """What one router saw since `reset_routing`; sums over micro-batches, on the router's device, this rank only.

    Attributes:
        losses: name -> sum of the loss without its coefficient (1.0 each for a perfectly balanced auxiliary loss).
        load: [N] float64, token copies that reached each expert (padding not counted).
        calls: micro-batches seen.
        detailed: whether to record what only the metrics need.
        entropy: where detailed, sum over counted tokens of the entropy in nats of the distribution over experts.
    """

    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    load: torch.Tensor | None = None
    calls: int = 0
    detailed: bool = False
    entropy: torch.Tensor | float = 0.0

    def add_loss(self, name: str, value: torch.Tensor) -> None:
        """Add a loss, a scalar without its coefficient."""
        self.losses[name] = self.losses.get(name, 0.0) + value.detach()

    def add_load(self, load_N: torch.Tensor, calls: int = 1) -> None:
        """Add the load of one micro-batch, or of a part that does not count as a call."""
        self.load = load_N.double() if self.load is None else self.load + load_N
        self.calls += calls

    @torch.no_grad()
    def add_entropy(self, logits: torch.Tensor, score_function: str, padding_mask: torch.Tensor | None) -> None:
        """Add the entropies of softmax(logits [S, B, N]), or of sigmoids over their sum; padding [S, B] counts not."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if score_function == "softmax":
            shares = wide.softmax(dim=-1)
        else:
            shares = torch.nn.functional.normalize(wide.sigmoid(), p=1, dim=-1)
        entropies = torch.special.entr(shares).sum(dim=-1).double()
        self.entropy = self.entropy + (entropies if padding_mask is None else entropies * ~padding_mask).sum()
