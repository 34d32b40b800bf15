"""A ladder: models of several widths, each trained for several numbers of tokens, with all sizes from one rule.

With s = width / the base's width, and one value of the base's batch for the smallest width:

- width: heads, latents of MLA and widths of experts grow with s; layers with s^depth_exponent, and experts with
  s^expert_exponent.
- learning rate: the base's times s^-rate_exponent. muP (arXiv 2203.03466, table 8) has exponent 1 for the matrices
  inside the model and 0 for embeddings; we have one rate for both. `rate_factors` tests the exponent: if it is right,
  the same factor is best at every width.
- tokens: `tokens_per_parameter` times N, the parameters that a token uses without embeddings (2203.15556).
- batch: times (tokens / those of the smallest width)^batch_exponent (2503.04715 fits an exponent of 0.57).

All numbers of tokens of a width are branches of one run, the trunk, whose learning rate is constant until its own decay
(`wsd`, 2405.18392): a shorter run continues from the trunk's checkpoint at the step at which its decay begins.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coe_megatron.checkpoint.names import name_of
from coe_megatron.config import RunConfig
from coe_megatron.config.change import with_settings
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.closed_forms import ModelShape, parameters
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.study.plan.study_file import LadderSettings

WIDTH, TOKENS, RATE = "width", "tokens per parameter", "rate factor"  # axes
_OF_MODEL = ("model.hidden_size", "model.num_attention_heads", "model.mla", "moe.ffn_hidden_size")
_OF_TRAINING = ("steps", "global_batch", "milestones", "branch_from")
_WIDTH_MULTIPLE = 4  # of latents and experts
_ANY_VOCABULARY = 64  # rows of the embedding, which no size here counts


def sizes(shape: ModelShape) -> tuple[int, int]:
    """N1 and N2 of a model: parameters that a token uses outside the iterated part, and in one iteration of it.

    Neither has embeddings, the output layer and the final norm.
    """
    counted = parameters(shape)
    outside, inside = counted.attention + counted.norms - counted.final_norm + counted.gains + counted.dense, 0
    expert = shape.ffn_matrices * shape.hidden * shape.expert_ffn
    shared = shape.hidden * (shape.ffn_matrices * shape.shared_ffn + shape.shared_gate)
    for count, kind in shape.moe_kinds:
        used = count * (kind.topk * expert + shared + kind.experts * shape.hidden)
        if kind.chain.iterations == shape.chain.iterations:
            inside += used
        else:
            outside += used
    return outside, inside


def ladder_axes(ladder: LadderSettings) -> dict[str, dict[str, Any]]:
    """The ladder's axes with their labels; tokens and rate factors are axes only if there are several."""
    axes: dict[str, Sequence[float]] = {
        WIDTH: ladder.widths,
        TOKENS: ladder.tokens_per_parameter,
        RATE: ladder.rate_factors,
    }
    return {
        name: {label_of(value): value for value in values}
        for name, values in axes.items()
        if name == WIDTH or len(values) > 1
    }


def label_of(value: float) -> str:
    """A number as a label: 2, not 2.0."""
    return str(int(value) if value == int(value) else value)


def settings_of(ladder: LadderSettings) -> tuple[str, ...]:
    """The settings that the rule decides."""
    layers = ("model.num_layers",) if ladder.depth_exponent else ()
    experts = ("moe.num_experts",) if ladder.expert_exponent else ()
    training = (f"training.{name}" for name in _OF_TRAINING)
    return (*_OF_MODEL, *layers, *experts, "optimizer.lr", "optimizer.decay", *training)


@dataclass(frozen=True)
class Rule:
    """The settings of every arm of a ladder.

    Attributes:
        base: the config that is scaled.
    """

    ladder: LadderSettings
    base: RunConfig

    def settings(self, labels: Mapping[str, str], folder: Callable[[Mapping[str, str]], str]) -> dict[str, Any]:
        """The settings of an arm.

        Args:
            labels: of the arm.
            folder: the folder of the arm with other labels.

        Raises:
            ConfigError: a shorter run would branch off within the trunk's warm-up.
        """
        axes = ladder_axes(self.ladder)
        width = axes[WIDTH][labels[WIDTH]]
        tokens = axes[TOKENS][labels[TOKENS]] if TOKENS in axes else self.ladder.tokens_per_parameter[0]
        factor = axes[RATE][labels[RATE]] if RATE in axes else self.ladder.rate_factors[0]
        own = self.model(width) | {
            "optimizer.lr": float(f"{self.rate(width) * factor:.4g}"),
            "training.global_batch": self.batch(width),
            "training.steps": self.steps(width, tokens),
        }
        if TOKENS in axes:
            own |= {"optimizer.decay": "wsd", **self._branch(width, tokens, labels, folder)}
        return own

    def rate(self, width: int) -> float:
        """The learning rate of a width."""
        return self.base.optimizer.lr * self._scale(width) ** -self.ladder.rate_exponent

    def model(self, width: int) -> dict[str, Any]:
        """The settings of the model of a width."""
        scale, model, moe = self._scale(width), self.base.model, self.base.moe
        found: dict[str, Any] = {
            "model.hidden_size": width,
            "model.num_attention_heads": max(1, round(model.num_attention_heads * scale)),
            "moe.ffn_hidden_size": _multiple(moe.ffn_hidden_size * scale, _WIDTH_MULTIPLE),
        }
        if model.mla is not None:
            for name, rank in (("kv_lora_rank", model.mla.kv_lora_rank), ("q_lora_rank", model.mla.q_lora_rank)):
                if rank is not None:
                    found[f"model.mla.{name}"] = _multiple(rank * scale, _WIDTH_MULTIPLE)
        for name, size in (("num_query_groups", model.num_query_groups), ("ffn_hidden_size", model.ffn_hidden_size)):
            if size is not None:
                found[f"model.{name}"] = max(1, round(size * scale))
        if self.ladder.depth_exponent:
            found["model.num_layers"] = max(1, round(model.num_layers * scale**self.ladder.depth_exponent))
        if self.ladder.expert_exponent:
            found["moe.num_experts"] = max(moe.topk, round(moe.num_experts * scale**self.ladder.expert_exponent))
        return found

    def parameters(self, width: int) -> int:
        """N of the base's model at a width: what a token uses without embeddings, each iteration counted."""
        config = with_settings(self.base, self.model(width))
        try:
            outside, inside = sizes(RunShape.of(config, _ANY_VOCABULARY).model)
        except ConfigError as error:
            raise ConfigError(f"ladder.widths has {width}: {error}") from None
        return outside + config.chain.iterations * inside

    def batch(self, width: int) -> int:
        """Samples per step, which all runs of a width share, as a multiple of the micro-batch."""
        ratio = self.parameters(width) / self.parameters(self.ladder.widths[0])
        training = self.base.training
        return _multiple(training.global_batch * ratio**self.ladder.batch_exponent, training.micro_batch)

    def steps(self, width: int, tokens_per_parameter: float) -> int:
        """Steps of a run."""
        tokens = self.parameters(width) * tokens_per_parameter
        return max(1, round(tokens / self.batch(width) / self.base.model.seq_length))

    def _scale(self, width: int) -> float:
        return width / self.base.model.hidden_size

    def _branch_step(self, width: int, tokens: float) -> int:
        """The last step before the decay of a run, where it leaves the trunk."""
        steps = self.steps(width, tokens)
        return steps - round(self.base.optimizer.cooldown * steps)

    def _branch(
        self, width: int, tokens: float, labels: Mapping[str, str], folder: Callable[[Mapping[str, str]], str]
    ) -> dict[str, Any]:
        *shorter, longest = self.ladder.tokens_per_parameter
        if tokens == longest:
            return {"training.milestones": sorted({self._branch_step(width, each) for each in shorter})}
        step, warmup = self._branch_step(width, tokens), round(self.base.optimizer.warmup * self.steps(width, longest))
        if step <= warmup:
            raise ConfigError(
                f"ladder.tokens_per_parameter has {tokens:g}: at width {width} its decay begins after step {step}, "
                f"within the {warmup} steps of warm-up with {longest:g}; use numbers nearer to each other, or less "
                "optimizer.warmup"
            )
        trunk = folder({**labels, TOKENS: label_of(longest)})
        return {"training.branch_from": f"{trunk}/seed-{{seed}}/checkpoints/{name_of(step)}"}


def _multiple(size: float, of: int) -> int:
    return max(1, round(size / of)) * of
