"""A copy of a config with another value of one setting."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

Config = TypeVar("Config")


def with_setting(config: Config, key: str, value: Any) -> Config:
    """A copy with another value of a setting that exists, named like `moe.topk`; nothing is checked."""
    name, _, rest = key.partition(".")
    inner = with_setting(getattr(config, name), rest, value) if rest else value
    return replace(config, **{name: inner})  # type: ignore[type-var]


def with_settings(config: Config, values: Mapping[str, Any]) -> Config:
    """The same for several settings."""
    for key, value in values.items():
        config = with_setting(config, key, value)
    return config
