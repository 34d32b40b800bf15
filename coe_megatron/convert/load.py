"""A trained model for a notebook, on one device and without torchrun.

from coe_megatron import load
model, tokenizer = load("runs/quickstart")
"""

from pathlib import Path
from typing import Any

import torch

from coe_megatron import extras
from coe_megatron.config import RunConfig
from coe_megatron.convert.architecture import Values, config_values
from coe_megatron.convert.coe_architecture import COE
from coe_megatron.convert.export import DTYPES, items
from coe_megatron.convert.source import Source
from coe_megatron.convert.weights import Weights
from coe_megatron.errors import ConfigError


def load(
    path: str | Path, device: str | torch.device = "cpu", dtype: str | None = None, tokenizer: str | Path | None = None
) -> tuple[Any, Any]:
    """Load a run's most recent checkpoint, a checkpoint, or an exported model.

    Args:
        path: a run's folder, a checkpoint in one, or a folder that `coe-checkpoint export` wrote.
        device: where the model goes.
        dtype: `float32`, `bfloat16` or `float16`; None for that of training.
        tokenizer: the tokenizer's file, if the run's data are elsewhere now.

    Returns:
        The model, a transformers `PreTrainedModel` in evaluation mode, and its tokenizer, None if it is not found.

    Raises:
        ConfigError: there is no complete checkpoint, or transformers is not installed.
    """
    model, its_tokenizer, _ = load_with_source(path, device, dtype, tokenizer)
    return model, its_tokenizer


def load_with_source(
    path: str | Path, device: str | torch.device = "cpu", dtype: str | None = None, tokenizer: str | Path | None = None
) -> tuple[Any, Any, Source | None]:
    """As `load`, and also the checkpoint with the config of its run; None for an exported model."""
    folder = Path(path).expanduser()
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}: it must be one of {', '.join(DTYPES)}")
    if (folder / "config.json").exists():
        return *_exported(folder, device, dtype), None
    found = Source.find(folder, None if tokenizer is None else Path(tokenizer))
    return of_source(found, device, dtype), found.fast_tokenizer(), found


def of_source(found: Source, device: str | torch.device = "cpu", dtype: str | None = None) -> Any:
    """The model of a checkpoint."""
    weights = Weights(found.checkpoint, masters=dtype == "float32")
    return of_weights(weights, found.config, found.special_tokens(), device, DTYPES[dtype] if dtype else None)


def of_weights(
    weights: Weights,
    config: RunConfig,
    special_tokens: Values,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Any:
    """The model of a run with these weights, tensor by tensor."""
    extras.require("transformers")
    from coe_megatron.convert.hf_files.configuration_coe import CoEConfig
    from coe_megatron.convert.hf_files.modeling_coe import CoEForCausalLM

    vocab = weights.shape(weights.place("embedding.word_embeddings.weight"))[0]
    with torch.device("meta"):
        model = CoEForCausalLM(CoEConfig(**config_values(config, COE, vocab, special_tokens)))
    for item in items(weights, config, COE, dtype):
        state = {name: tensor.to(device) for name, tensor in zip(item.names, item.make(), strict=True)}
        unknown = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
        assert not unknown, unknown
    model.tie_weights()
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    assert not left, left
    return model.eval()


def _exported(folder: Path, device: str | torch.device, dtype: str | None) -> tuple[Any, Any]:
    transformers = extras.require("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype or "auto")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    except (OSError, ValueError):
        tokenizer = None
    return model.to(device).eval(), tokenizer
