"""What is between the two products of an expert, with the gates of the router as weights, and its gradients.

R: rows, F: ffn, O: 2F, or F without gating.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import weighted_swiglu, weighted_swiglu_back
from torch import Tensor


class SwiGLU:
    """a = g silu(gate) * value for the halves [gate, value] of the first product, in few passes over memory."""

    def forward(self, inner_RO: Tensor, gates_R: Tensor) -> Tensor:
        """See `expert_mlp.Activation`."""
        gate_RF, value_RF = inner_RO.chunk(2, dim=-1)
        return F.silu(gate_RF).mul_(value_RF).mul_(gates_R.unsqueeze(-1))

    def backward(self, inner_RO: Tensor, gates_R: Tensor, grad_RF: Tensor) -> tuple[Tensor, Tensor]:
        """See `expert_mlp.Activation`."""
        gate_RF, value_RF = inner_RO.chunk(2, dim=-1)
        silu_RF = F.silu(gate_RF)
        grad_gates_R = (silu_RF * value_RF).mul(grad_RF.to(gates_R.dtype)).sum(-1)  # not rounded to bf16
        grad_RF.mul_(gates_R.unsqueeze(-1))
        grad_RO = torch.empty_like(inner_RO)
        of_gate_RF, of_value_RF = grad_RO.chunk(2, dim=-1)
        torch.mul(grad_RF, silu_RF, out=of_value_RF)
        torch.ops.aten.silu_backward.grad_input(grad_RF.mul_(value_RF), gate_RF, grad_input=of_gate_RF)
        return grad_RO, grad_gates_R


class FusedSwiGLU:
    """The same with Megatron's functions, which torch compiles to one kernel each way (`bias_activation_fusion`)."""

    def forward(self, inner_RO: Tensor, gates_R: Tensor) -> Tensor:
        """See `expert_mlp.Activation`."""
        return weighted_swiglu(inner_RO, gates_R.unsqueeze(-1))

    def backward(self, inner_RO: Tensor, gates_R: Tensor, grad_RF: Tensor) -> tuple[Tensor, Tensor]:
        """See `expert_mlp.Activation`."""
        grad_RO, grad_gates_R1 = weighted_swiglu_back(grad_RF, inner_RO, gates_R.unsqueeze(-1))
        return grad_RO, grad_gates_R1.squeeze(-1)


@dataclass(frozen=True)
class OtherActivation:
    """Any function, with autograd's gradients.

    Attributes:
        function: elementwise.
        is_gated: a = g function(first half) * second half; else g function(the product).
    """

    function: Callable[[Tensor], Tensor]
    is_gated: bool

    def forward(self, inner_RO: Tensor, gates_R: Tensor) -> Tensor:
        """See `expert_mlp.Activation`."""
        if self.is_gated:
            gate_RF, value_RF = inner_RO.chunk(2, dim=-1)
            active_RF = self.function(gate_RF) * value_RF
        else:
            active_RF = self.function(inner_RO)
        return (active_RF * gates_R.unsqueeze(-1)).to(inner_RO.dtype)

    def backward(self, inner_RO: Tensor, gates_R: Tensor, grad_RF: Tensor) -> tuple[Tensor, Tensor]:
        """See `expert_mlp.Activation`."""
        inputs = inner_RO.detach().requires_grad_(), gates_R.detach().requires_grad_()
        with torch.enable_grad():
            active_RF = self.forward(*inputs)
        of_inner_RO, of_gates_R = torch.autograd.grad(active_RF, inputs, grad_RF)
        return of_inner_RO, of_gates_R
