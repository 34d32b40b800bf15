"""The settings of a run: dataclasses, YAML, overrides, checks. Nothing here imports torch."""

from coe_megatron.config.load import ConfigError, dump, flat, load, parse
from coe_megatron.config.settings import RunConfig

__all__ = ["ConfigError", "RunConfig", "dump", "flat", "load", "parse"]
