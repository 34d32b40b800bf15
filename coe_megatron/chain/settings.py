"""What makes a chain a chain: the settings of one Chain-of-Experts layer, validated where they are made."""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

from coe_megatron.errors import ConfigError

Gating = Literal["independent", "shared_router", "fixed"]
Residual = Literal["inner", "outer", "init"]
NormPlacement = Literal["prenorm", "reference", "iteration_norm"]
Recompute = Literal["none", "experts", "iteration", "layer"]
AuxLossReduction = Literal["sum", "mean", "joint"]


@dataclass(frozen=True)
class ChainSettings:
    """Settings of the chain; everything else about the layer (N, K, sizes) belongs to the layer itself.

    What comes after `aux_loss_reduction` are variants that the paper does not have; by default they are off.

    Attributes:
        iterations: C, how often tokens pass through the layer's experts; C = 1 is a mixture of experts.
        gating: which router drives iteration t: `independent` W_t each, `shared_router` one W applied afresh, `fixed`
            the experts and weights of iteration 1 (paper eq. 8).
        residual: r(t): `inner` x(t-1), `init` x(0) (eq. 10), `outer` none inside and the input once at the end (eq. 9).
        norm_placement: what leaves the sub-layer: `prenorm` h + Δ, `reference` u + Δ as in the authors' code,
            `iteration_norm` every iteration a pre-norm sub-layer with a norm gain of its own.
        aux_loss_reduction: how the coefficients of auxiliary and z-losses scale with C: `sum` gives each iteration
            the full coefficient (the authors' code), `mean` gives each 1/C of it. `joint` has one auxiliary loss
            N Σ_i f_i P_i with the full coefficient, of the summed load: f_i is the share of expert i in all C·S·K
            choices of a sequence, P_i its mean score over all C·S, so that an expert used twice counts twice; it is
            noted at the last iteration, and the z-losses get 1/C each. The three are one at C = 1.
        increment_scale: s in x(t) = s F_t(x(t-1)) + r(t), a constant of every increment, such as 0.707 for C = 2.
        learned_scale: x(t) = a_t ⊙ F_t(x(t-1)) + r(t) with a learned gain a_t [D] for each iteration, which starts at
            `increment_scale`, here also at 0 (as in ReZero, arXiv 2003.04887, and LayerScale, arXiv 2103.17239).
        conditioned: x(t) = F_t(c_t ⊙ x(t-1)) + r(t): router and experts of iteration t see the state through a learned
            gain c_t [D], 1 at first; not with `iteration_norm`, whose norms have gains of their own.
        shared_once: F_t(x) = Σ_i g[t,i] E_i(x) for t > 1: the shared experts act in iteration 1 alone, so that
            CoE-2(4)+1 has the expert FLOPs of MoE(8)+1.
        no_return: logits[t,i] = -inf before scores are taken, for every expert i that has had the token in iterations
            1 to t-1 (an expert that turned it away, being full, has not); needs C·K <= N, and neither `fixed` gating
            nor groups of experts.
        routers_apart: W_t, t = 0 .. C-1, starts as W_0 with its rows rolled by ⌊t·N/C⌋, so that the same state would
            choose other experts in a later iteration; `independent` gating only. It touches initial weights alone.
        scaled_init: W_2 of routed and shared experts starts with a deviation √C times smaller, so that an inner chain's
            increments, which C iterations add up, start about as large as one of them would be (as Megatron's division
            by √(2L) has it for L layers). It touches initial weights alone.
        layers: numbers, from 1, of the layers that are chains; the other layers with experts are Megatron's MoE layer,
            pre-norm, with C·K of N experts a token, which costs about the same. null makes all of them chains.

    Raises:
        ConfigError: a field has no valid value; the message names the field, the value and the valid ones.
    """

    iterations: int = 2
    gating: Gating = "independent"
    residual: Residual = "inner"
    norm_placement: NormPlacement = "prenorm"
    aux_loss_reduction: AuxLossReduction = "sum"
    increment_scale: float = 1.0
    learned_scale: bool = False
    conditioned: bool = False
    shared_once: bool = False
    no_return: bool = False
    routers_apart: bool = False
    scaled_init: bool = False
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.iterations, int) or isinstance(self.iterations, bool) or self.iterations < 1:
            raise ConfigError(f"chain.iterations is {self.iterations!r}: it must be an integer of at least 1")
        for field in fields(self):
            value, valid = getattr(self, field.name), get_args(field.type)
            if get_origin(field.type) is Literal and value not in valid:
                raise ConfigError(f"chain.{field.name} is {value!r}: it must be one of {', '.join(valid)}")
            if field.type is bool and not isinstance(value, bool):
                raise ConfigError(f"chain.{field.name} is {value!r}: it must be true or false")
        scale = self.increment_scale
        if not isinstance(scale, int | float) or isinstance(scale, bool) or not math.isfinite(scale):
            raise ConfigError(f"chain.increment_scale is {scale!r}: it must be a finite number")
        if scale == 0 and not self.learned_scale:
            raise ConfigError(f"chain.increment_scale is {scale!r}: without chain.learned_scale it must not be 0")
        if self.no_return and self.gating == "fixed":
            raise ConfigError(
                "chain.no_return is true: chain.gating fixed sends tokens back to the same experts, take another"
            )
        if self.routers_apart and self.gating != "independent":
            raise ConfigError(f"chain.routers_apart is true: chain.gating must be independent, not {self.gating}")
        if self.conditioned and self.norm_placement == "iteration_norm":
            raise ConfigError(
                "chain.conditioned is true: with chain.norm_placement iteration_norm, whose norms have gains, "
                "leave it false"
            )

        if self.layers is not None:
            self._check_layers(self.layers)

    def _check_layers(self, layers: object) -> None:
        counts = isinstance(layers, tuple) and all(isinstance(n, int) and not isinstance(n, bool) for n in layers)
        if not isinstance(layers, tuple) or not counts:
            raise ConfigError(f"chain.layers is {layers!r}: it must be a list of integers, or null")
        if not layers or min(layers) < 1 or len(set(layers)) < len(layers):
            raise ConfigError(f"chain.layers is {list(layers)}: it must name layers, from 1, and each of them once")

    def is_chain(self, number: int) -> bool:
        """Whether the layer of this number, from 1, is a chain, if it has experts."""
        return self.layers is None or number in self.layers

    @property
    def plain(self) -> "ChainSettings":
        """What makes a layer that is no chain: with C·K experts a token it is Megatron's MoE layer."""
        return ChainSettings(iterations=1)

    def require_experts(self, experts: int, topk: int, groups: int | None) -> None:
        """Raise a ConfigError if a layer of N experts in so many groups cannot have this chain, with K of them a token.

        Args:
            experts: N.
            topk: K.
            groups: into how many groups the choice falls; None for no grouping.
        """
        needed, asks = self.iterations * topk, "chain.no_return is true"
        if self.layers is not None:
            asks = f"chain.layers is {list(self.layers)}: layers that are no chains choose from all experts at once"
            if groups is not None:
                raise ConfigError(f"{asks}, leave groups of experts away")
            if needed > experts:
                raise ConfigError(f"{asks}, so they need {needed}, and a layer has {experts}")
        if not self.no_return:
            return
        if groups is not None:
            raise ConfigError("chain.no_return is true: with groups of experts, which it would empty, leave it false")
        if self.iterations * topk > experts:
            raise ConfigError(
                f"chain.no_return is true: {self.iterations} iterations with {topk} experts each need "
                f"{self.iterations * topk} experts, and a layer has {experts}"
            )
