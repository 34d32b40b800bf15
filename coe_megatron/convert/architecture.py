"""An architecture of Hugging Face models: which models of ours it represents, its config.json and its tensors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from coe_megatron.config.layout import moe_pattern
from coe_megatron.config.settings import RunConfig
from coe_megatron.convert import rules
from coe_megatron.convert.rules import Constant, Rule, Rules

Values = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """A kind of model.

    Attributes:
        name: `model_type` in config.json.
        class_name: of the language model in transformers.
        why_not: reasons why a model is not of this kind; none if it is.
        values: config.json's fields of this kind; those of all kinds are in `config_values`.
        moe_rules: tensors of a layer with experts, without attention and norms, for a layer number from 0.
        dense_rules: tensors of a layer without experts.
        more: further constants of every layer.
    """

    name: str
    class_name: str
    why_not: Callable[[RunConfig], Iterator[str]]
    values: Callable[[RunConfig], Values]
    moe_rules: Callable[[RunConfig, int], Rules]
    dense_rules: Rules
    more: Callable[[RunConfig], Rules] = lambda config: []

    def layer_rules(self, config: RunConfig, layer: int) -> Rules:
        """All rules of a layer, from 0."""
        has_experts = moe_pattern(config)[layer]
        feed_forward = self.moe_rules(config, layer) if has_experts else self.dense_rules
        return [*rules.attention(config), *self.more(config), *feed_forward]


def all_rules(config: RunConfig, architecture: Architecture) -> Iterator[tuple[str, int | None, Rule | Constant]]:
    """Prefix of their names, number of the layer (from 0; None outside layers) and rule, in the order of the model."""
    for rule in rules.of_model(config.model):
        yield "", None, rule
    for layer in range(config.model.num_layers):
        for rule in architecture.layer_rules(config, layer):
            yield f"model.layers.{layer}.", layer, rule


def is_stacked(config: RunConfig) -> bool:
    """Whether a checkpoint has one tensor for all layers, since all are alike."""
    return isinstance(config.moe.layer_freq, int) and config.moe.layer_freq == 1 and config.chain.layers is None


def config_values(config: RunConfig, architecture: Architecture, vocab_size: int, tokens: Values) -> Values:
    """The content of `config.json`.

    Args:
        vocab_size: rows of the embedding.
        tokens: `bos_token_id` and so on.
    """
    model = config.model
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.name,
        "dtype": "bfloat16" if config.training.precision == "bf16" else "float32",
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "max_position_embeddings": model.seq_length,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": not model.untied_embeddings,
        "use_cache": True,
        **tokens,
        **architecture.values(config),
    }


def yarn(config: RunConfig) -> Values | None:
    mla = config.model.mla
    if mla is None or mla.rotary_scaling_factor <= 1:
        return None
    return {
        "factor": mla.rotary_scaling_factor,
        "original_max_position_embeddings": mla.original_max_position_embeddings,
        "mscale": mla.mscale,
        "mscale_all_dim": mla.mscale_all_dim,
    }
