"""Settings of a Chain-of-Experts layer, validated on construction."""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

from coe_megatron.errors import ConfigError

Gating = Literal["independent", "shared_router", "fixed"]
Residual = Literal["inner", "outer", "init"]
NormPlacement = Literal["prenorm", "reference", "iteration_norm"]
Recompute = Literal["none", "experts", "iteration", "layer"]
AuxLossReduction = Literal["sum", "mean"]


@dataclass(frozen=True)
class ChainSettings:
    """Settings of the chain; the other settings of the layer (N, K, sizes) are in the section `moe`.

    The last seven are variants that are not in the paper (`chain.variants`); all are off by default.

    Attributes:
        iterations: C, the number of iterations; C = 1 is a mixture of experts.
        gating: router of iteration t: `independent`, W_t; `shared_router`, one W for all, applied to each state;
            `fixed`, the experts and gates of iteration 1 (paper eq. 8).
        residual: r(t): `inner` x(t-1), `init` x(0) (eq. 10), `outer` none in the iterations, and the input added once
            at the end (eq. 9).
        norm_placement: output of the sub-layer with input h and u = norm(h): `prenorm` h + Δ; `reference` u + Δ, as in
            the authors' code; `iteration_norm`, where every iteration is a pre-norm sub-layer with its own norm gain.
        aux_loss_reduction: how coefficients of auxiliary and z-losses scale with C: `sum` gives each iteration the full
            coefficient (the authors' code), `mean` 1/C of it.
        learned_scale: initial value of a learned gain a_t [D] per iteration, x(t) = a_t ⊙ F_t(x(t-1)) + r(t) (ReZero,
            arXiv 2003.04887, starts at 0; LayerScale, arXiv 2103.17239); null for none.
        conditioned: x(t) = F_t(c_t ⊙ x(t-1)) + r(t) with a learned gain c_t [D] per iteration, initially 1, on the
            input of router and experts; not with `iteration_norm`, whose norms have such gains.
        no_return: mask every expert i that processed the token in iterations 1 to t-1, logits[t,i] = -inf (an expert
            that dropped it for capacity is not masked); needs C·K <= N, not with `fixed` gating or expert groups.
        modulation_rank: r of a modulation that sees the token: x(t) = F_t(c_t ⊙ x(t-1)) + r(t) with c_t = 1 + W2_t
            silu(W1 x(t-1)), W1 [r, D] and a W2_t [D, r] per iteration, which starts at 0 (modelled on the idea of
            LoopMoE, arXiv 2606.04438; its formula is another); null for none; not with `conditioned`.
        streams: n streams between iterations with learned static mixing (hyper-connections, arXiv 2409.19606), which
            start as the plain chain; null for one stream without mixing; needs C > 1 and the residual `inner`.
        latent: L, the width in which the chain iterates: z(0) = W_down u, h' = h + W_up Δ, with experts, routers and
            gains of this width (as LatentMoE, arXiv 2601.18089, which does not iterate); null for D; not with
            `iteration_norm` or `layers`.
        layers: 1-based numbers of the MoE layers that are chains; the others are Megatron's MoE layer, pre-norm, with
            C·K of N experts per token, at about the same FLOPs. null makes all of them chains.

    Raises:
        ConfigError: a field has no valid value; the message names the field, the value and the valid ones.
    """

    iterations: int = 2
    gating: Gating = "independent"
    residual: Residual = "inner"
    norm_placement: NormPlacement = "prenorm"
    aux_loss_reduction: AuxLossReduction = "sum"
    learned_scale: float | None = None
    conditioned: bool = False
    no_return: bool = False
    modulation_rank: int | None = None
    streams: int | None = None
    latent: int | None = None
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
        scale = self.learned_scale
        is_number = isinstance(scale, int | float) and not isinstance(scale, bool) and math.isfinite(scale)
        if scale is not None and not is_number:
            raise ConfigError(f"chain.learned_scale is {scale!r}: it must be a finite number, or null")
        if self.no_return and self.gating == "fixed":
            raise ConfigError(
                "chain.no_return is true: chain.gating fixed sends tokens back to the same experts, take another"
            )
        if self.conditioned and self.norm_placement == "iteration_norm":
            raise ConfigError(
                "chain.conditioned is true: with chain.norm_placement iteration_norm, whose norms have gains, "
                "leave it false"
            )
        self._check_sizes()
        if self.layers is not None:
            self._check_layers(self.layers)

    def _check_sizes(self) -> None:
        for name, least in (("modulation_rank", 1), ("streams", 2), ("latent", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ConfigError(f"chain.{name} is {value!r}: it must be an integer of at least {least}, or null")
        if self.modulation_rank is not None and self.conditioned:
            raise ConfigError(
                f"chain.modulation_rank is {self.modulation_rank}: chain.conditioned must be false with it"
            )
        if self.streams is not None and (self.iterations == 1 or self.residual != "inner"):
            given = f"{self.iterations} iteration{'s' * (self.iterations > 1)} and chain.residual {self.residual}"
            raise ConfigError(f"chain.streams is {self.streams}: it needs at least 2 iterations and inner, not {given}")
        if self.latent is not None and self.norm_placement == "iteration_norm":
            raise ConfigError(
                f"chain.latent is {self.latent}: norms of chain.norm_placement iteration_norm are of the residual "
                "stream, take prenorm or reference"
            )
        if self.latent is not None and self.layers is not None:
            raise ConfigError(
                f"chain.latent is {self.latent}: with chain.layers, whose experts must be alike, leave it null"
            )

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
    def sums_increments(self) -> bool:
        """Whether Δ, which the chain adds to its input, is Σ_t F_t; else it is F_C."""
        return self.residual == "inner"

    def width(self, hidden: int) -> int:
        """Dimensions in which the chain iterates: L of `latent`, otherwise D.

        Raises:
            ConfigError: L is not below D.
        """
        if self.latent is not None and self.latent >= hidden:
            raise ConfigError(f"chain.latent is {self.latent}: it must be below the hidden size, {hidden}")
        return self.latent or hidden

    @property
    def plain(self) -> "ChainSettings":
        """Settings of a MoE layer that is not a chain (C = 1)."""
        return ChainSettings(iterations=1)

    def require_experts(self, experts: int, topk: int, groups: int | None) -> None:
        """Check that a layer with these experts can have this chain.

        Args:
            experts: N.
            topk: K.
            groups: number of expert groups of group-limited routing; None for none.

        Raises:
            ConfigError: it cannot; one line that says why.
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
