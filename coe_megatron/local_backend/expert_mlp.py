"""The experts' feed-forward as one autograd function, from tokens to the sum over each token's experts.

    y_m = sum over the rows r of token m:  W2_e a_r,   a_r = g_r silu(gate_r) * value_r,   [gate_r, value_r] = W1_e x_m

Rows, the copies of tokens for their experts, are not kept: the backward pass gathers them again (the idea of SonicMoE,
arXiv 2512.14080). It keeps the first product and, unless it is to be recomputed, a.

M: tokens, k: slots per token (places for a choice), R: rows, E: local experts, D: hidden, F: ffn, O: 2F, or F without
gating.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from coe_megatron.alignment import ALIGNMENT

# On a CPU with AMX in bf16, rows of an expert are padded to a multiple of this: oneDNN builds a kernel for each number.
_PADDED_ROWS = 32


def has_amx() -> bool:
    """Whether this machine's CPU has Intel's AMX, instructions that multiply matrices in bf16."""
    return torch.cpu._is_amx_tile_supported()


def needs_padding(tokens_MD: Tensor) -> bool:
    """Whether the rows of each expert are padded to few sizes here."""
    return tokens_MD.dtype == torch.bfloat16 and tokens_MD.device.type == "cpu" and has_amx()


class Assignment(NamedTuple):
    """Tokens of this rank's experts, and who works on which.

    Attributes:
        tokens_MD: their states.
        gates_Mk: g, the gate of each slot; of a slot that no row uses, anything.
        slots_R: int64, sorted by expert: row r is token slots_R[r] // k with gate slots_R[r] of M·k.
        ends_E: int32, the row after the last one of each expert.
    """

    tokens_MD: Tensor
    gates_Mk: Tensor
    slots_R: Tensor
    ends_E: Tensor

    @property
    def index_R(self) -> Tensor:
        """The token of each row."""
        k = self.gates_Mk.shape[1]
        return self.slots_R if k == 1 else self.slots_R // k

    @property
    def gates_R(self) -> Tensor:
        """The gate of each row."""
        return self.gates_Mk.flatten().index_select(0, self.slots_R)

    @property
    def counts_E(self) -> Tensor:
        """int32, the number of rows of each expert."""
        return self.ends_E.diff(prepend=self.ends_E.new_zeros(1))

    def padded(self) -> "Assignment":
        """With rows added to experts that have some, if `needs_padding`; else itself.

        They are rows of one more token, of zeros and with gates of zero: no other token's output and gradients, and no
        weight's gradient, depend on them.
        """
        if not needs_padding(self.tokens_MD):
            return self
        counts_E = self.counts_E
        shifts_E = (-counts_E % _PADDED_ROWS).cumsum(0, dtype=torch.int32)
        places_R = torch.arange(len(self.slots_R)) + shifts_E.repeat_interleave(counts_E)
        rows = len(self.slots_R) + int(shifts_E[-1])
        slots = self.slots_R.new_full((rows,), self.gates_Mk.numel()).index_copy_(0, places_R, self.slots_R)
        tokens, gates = (F.pad(each, (0, 0, 0, 1)) for each in (self.tokens_MD, self.gates_Mk))
        return Assignment(tokens, gates, slots, self.ends_E + shifts_E)


class Activation(Protocol):
    """What is between the products, weighted by the gates."""

    def forward(self, inner_RO: Tensor, gates_R: Tensor) -> Tensor:
        """First product [R, O] and gates -> a [R, F], in the dtype of the product."""

    def backward(self, inner_RO: Tensor, gates_R: Tensor, grad_RF: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the first product [R, O] and of the gates [R]; may overwrite `grad_RF`."""


@dataclass(frozen=True)
class _Rows:
    """What the rows of one use give to the weights' gradients, but for the products."""

    assignment: Assignment
    grad_MD: Tensor
    active_RF: Tensor
    grad_RO: Tensor


class WeightGradients:
    """Gradients of both weights, summed over all uses in a chain before autograd sees them.

    `handle` is a scalar that every use takes as an input: autograd asks for the sum when all uses have run backward. A
    gradient per use would be another tensor of the weights' size each. Rows that are few beside the weights are kept,
    so that one product for each weight makes the sum.
    """

    def __init__(self, weight1_EOD: Tensor, weight2_EDF: Tensor) -> None:
        self._sums: list[Tensor | None] = [None, None]
        self._rows: list[_Rows] = []
        self._elements = weight1_EOD.numel() + weight2_EDF.numel()
        self.handle = _Collected.apply(self, weight1_EOD, weight2_EDF)

    def add(self, rows: _Rows) -> None:
        """Add what one use gives."""
        self._rows.append(rows)
        kept = sum(each.active_RF.numel() + each.grad_RO.numel() + each.grad_MD.numel() for each in self._rows)
        if kept > self._elements // 2:
            self._multiply()

    def take(self) -> list[Tensor | None]:
        """The sums, which are then forgotten."""
        if self._rows:
            self._multiply()
        sums, self._sums = self._sums, [None, None]
        return sums

    def _multiply(self) -> None:
        """Turn rows into sums."""
        rows, self._rows = self._rows, []
        ends_E, index_R, order_R = _in_one_order([each.assignment for each in rows])
        grad_RO = _joined([each.grad_RO for each in rows], order_R)
        tokens_MD = _joined([each.assignment.tokens_MD for each in rows])
        self._add_up(0, _weight_gradient(grad_RO, tokens_MD.index_select(0, index_R), ends_E))
        del grad_RO, tokens_MD
        grad_RD = _joined([each.grad_MD for each in rows]).index_select(0, index_R)
        active_RF = _joined([each.active_RF for each in rows], order_R)
        self._add_up(1, _weight_gradient(grad_RD, active_RF, ends_E))

    def _add_up(self, which: int, gradient: Tensor) -> None:
        held = self._sums[which]
        self._sums[which] = gradient if held is None else held.add_(gradient)


def _in_one_order(uses: list[Assignment]) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows of all uses, one after the other, sorted by expert.

    Returns:
        The row after the last one of each expert; the token of each row among the tokens of all uses; and the order of
        the rows, None for a single use, which is sorted.
    """
    first, *others = uses
    if not others:
        return first.ends_E, first.index_R, None
    experts, tokens, before = [], [], 0
    for use in uses:
        rows = torch.arange(len(use.slots_R), dtype=torch.int32, device=use.slots_R.device)
        experts.append(torch.searchsorted(use.ends_E, rows, right=True))
        tokens.append(use.index_R + before)
        before += len(use.tokens_MD)
    order_R = torch.cat(experts).argsort(stable=True)
    return sum((use.ends_E for use in others), first.ends_E), torch.cat(tokens).index_select(0, order_R), order_R


def _joined(parts: list[Tensor], order_R: Tensor | None = None) -> Tensor:
    """The rows of all parts, in an order if there is one."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if order_R is None else torch.cat(parts).index_select(0, order_R)


class _Collected(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradients: WeightGradients, weight1_EOD: Tensor, weight2_EDF: Tensor) -> Tensor:
        ctx.gradients = gradients
        return weight1_EOD.new_zeros(())

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients.take()


@dataclass(frozen=True)
class ExpertMLP:
    """The feed-forward of E experts.

    Attributes:
        weights: W1 [E, O, D] and W2 [E, D, F].
        activation: between the products.
        keeps_activation: whether a is kept for the backward pass; else it is computed again.
    """

    weights: tuple[Tensor, Tensor]
    activation: Activation
    keeps_activation: bool

    def __call__(self, assignment: Assignment, gradients: WeightGradients | None) -> Tensor:
        """The sum over each token's experts, [M, D].

        Args:
            gradients: what the weights' gradients are added to; None if there will be none.
        """
        handle = None if gradients is None else gradients.handle
        return _first(_ExpertMLP.apply(self, gradients, handle, *assignment), len(assignment.tokens_MD))

    def forward(self, assignment: Assignment) -> tuple[Tensor, Tensor, Tensor | None]:
        """The output [M, D], and what to keep: the first product [R, O], and a [R, F] or None."""
        (w1, w2), (tokens_MD, index_R) = self.weights, (assignment.tokens_MD, assignment.index_R)
        inner_RO = _product(tokens_MD.index_select(0, index_R), w1.transpose(1, 2), assignment.ends_E)
        active_RF = self.activation.forward(inner_RO, assignment.gates_R)
        rows_RD = _product(active_RF, w2.transpose(1, 2), assignment.ends_E)
        output_MD = torch.zeros_like(tokens_MD).index_add_(0, index_R, rows_RD)
        return output_MD, inner_RO, active_RF if self.keeps_activation else None

    def backward(
        self,
        assignment: Assignment,
        inner_RO: Tensor,
        active_RF: Tensor | None,
        grad_MD: Tensor,
        gradients: WeightGradients | None,
    ) -> tuple[Tensor, Tensor]:
        """The gradients of tokens [M, D] and of the rows' gates [R]."""
        (w1, w2), tokens_MD, index_R = self.weights, assignment.tokens_MD, assignment.index_R
        gates_R, ends_E = assignment.gates_R, assignment.ends_E
        if active_RF is None:
            active_RF = self.activation.forward(inner_RO, gates_R)
        grad_RF = _product(grad_MD.index_select(0, index_R), w2, ends_E)
        grad_RO, grad_gates_R = self.activation.backward(inner_RO, gates_R, grad_RF)
        del grad_RF
        if gradients is not None:
            gradients.add(_Rows(assignment, grad_MD, active_RF, grad_RO))
        del active_RF
        rows_RD = _product(grad_RO, w1, ends_E)
        return torch.zeros_like(tokens_MD).index_add_(0, index_R, rows_RD), grad_gates_R


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        mlp: ExpertMLP,
        gradients: WeightGradients | None,
        handle: Tensor | None,
        tokens_MD: Tensor,
        gates_Mk: Tensor,
        slots_R: Tensor,
        ends_E: Tensor,
    ) -> Tensor:
        output_MD, inner_RO, active_RF = mlp.forward(Assignment(tokens_MD, gates_Mk, slots_R, ends_E).padded())
        ctx.mlp, ctx.gradients = mlp, gradients
        ctx.save_for_backward(tokens_MD, gates_Mk, slots_R, ends_E, inner_RO, active_RF)
        return output_MD

    @staticmethod
    def backward(ctx, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        *given, inner_RO, active_RF = ctx.saved_tensors
        assignment, tokens = Assignment(*given).padded(), len(given[0])
        # A sum's gradient is expanded, with strides of zero.
        arguments = assignment, inner_RO, active_RF, grad_MD.contiguous(), ctx.gradients
        grad_tokens_MD, grad_gates_R = ctx.mlp.backward(*arguments)
        grad_gates_Mk = torch.zeros_like(assignment.gates_Mk).flatten().index_copy_(0, assignment.slots_R, grad_gates_R)
        of_handle = None if ctx.gradients is None else grad_MD.new_zeros(())
        grad_gates_Mk = grad_gates_Mk.view_as(assignment.gates_Mk)
        return None, None, of_handle, _first(grad_tokens_MD, tokens), _first(grad_gates_Mk, tokens), None, None


def _first(states: Tensor, count: int) -> Tensor:
    """The first ones. If these are all, no view: autograd adds to no gradient in place that is a view."""
    return states if len(states) == count else states[:count]


def _product(rows_RI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Rows times the matrix of their expert, [R, O]; a rank may have no rows, for which CUDA's kernel is not made."""
    if not len(rows_RI):
        return rows_RI.new_zeros(0, weight_EIO.shape[2])
    return F.grouped_mm(_aligned(rows_RI), _aligned(weight_EIO), offs=ends_E)


def _weight_gradient(grad_RO: Tensor, rows_RI: Tensor, ends_E: Tensor) -> Tensor:
    """The gradient [E, O, I] of the experts' matrices; zero for experts without rows."""
    if not len(rows_RI):
        return rows_RI.new_zeros(len(ends_E), grad_RO.shape[1], rows_RI.shape[1])
    gradient_EOI = F.grouped_mm(_aligned(grad_RO).t(), _aligned(rows_RI), offs=ends_E)
    if gradient_EOI.is_cuda:
        # Kernels were seen to leave other numbers and NaN there (pytorch issues 172439 and 193633).
        is_empty_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
        gradient_EOI.masked_fill_(is_empty_E[:, None, None], 0)
    return gradient_EOI


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if its address (in a flat buffer of ZeRO, say) is not one that CUDA's kernel accepts."""
    return tensor.clone() if tensor.is_cuda and tensor.data_ptr() % ALIGNMENT else tensor
