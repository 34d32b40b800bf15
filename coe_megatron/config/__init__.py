"""The settings of a run: dataclasses, YAML, overrides, checks. Nothing here imports torch."""

from coe_megatron.config.load import dump, flat, load, parse
from coe_megatron.config.settings import RunConfig

__all__ = ["RunConfig", "dump", "flat", "load", "parse"]
