"""The settings of a run: dataclasses, YAML, overrides, checks. Does not import torch."""

from coe_megatron.config.load import dump, flat, load, parse
from coe_megatron.config.settings import RunConfig

__all__ = ["RunConfig", "dump", "flat", "load", "parse"]
