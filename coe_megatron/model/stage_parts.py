"""The parts of a pipeline stage that take turns in Megatron's interleaved schedule, as one module."""

from typing import Any, cast

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig


class StageParts(torch.nn.ModuleList):
    """Models of consecutive layers; other stages have the layers between them. The schedule calls them one by one."""

    @property
    def config(self) -> TransformerConfig:
        """Megatron's config, the same for all parts."""
        return self[0].config

    def sharded_state_dict(self) -> dict[str, Any]:
        """The parameters of all parts by their name here; their keys in checkpoints are those of the complete model."""
        return {
            f"{number}.{name}": shard
            for number, part in enumerate(self)
            for name, shard in cast(GPTModel, part).sharded_state_dict().items()
        }


def parts_of(model: torch.nn.Module) -> list[GPTModel]:
    """The parts of a stage; a stage that is not divided is one."""
    return list(model) if isinstance(model, StageParts) else [model]
