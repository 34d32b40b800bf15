"""From a YAML file and overrides to a checked RunConfig; whatever is wrong becomes one line that names the field."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError
from yaml import YAMLError

from coe_megatron.config.checks import check
from coe_megatron.config.settings import RunConfig


class ConfigError(ValueError):
    """A mistake in a config or an override; its text is one line for the user."""


def load(path: str | Path, overrides: Sequence[str] = (), world_size: int | None = None) -> RunConfig:
    """Read a config.

    Args:
        path: YAML file; keys are the fields of RunConfig, missing ones take their defaults. The key `base` names one
            file or a list of files, relative to this one, whose settings hold where this one says nothing; of several
            the later wins.
        overrides: `key.sub=value`, the value written as in YAML; they win over the file.
        world_size: number of ranks, if known, to check the layout and the batch against.

    Raises:
        ConfigError: with one line that names the field, its value and what would be valid.
    """
    merged = OmegaConf.merge(_read(Path(path)), *(_override(text) for text in overrides))
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: a value refers to what is not there: {' '.join(str(error).split())}") from None
    config = parse(values)
    try:
        check(config, world_size)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return config


def parse(values: Any) -> RunConfig:
    """Nested dict -> RunConfig; ConfigError on unknown keys and wrong types or values."""
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        # A misspelt key is missing under its right name too, and its own line says more.
        told = min(error.errors(), key=lambda found: found["type"] == "missing")
        raise ConfigError(_explain(told)) from None


def dump(config: RunConfig) -> str:
    """The whole config as YAML; `load` reads it back to an equal config."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(asdict(config))))


def _read(path: Path, including: tuple[Path, ...] = ()) -> Any:
    """The file's settings over those of its bases; `including` is the chain of files that led here."""
    if path.resolve() in including:
        raise ConfigError(
            f"{path}: base leads back to this file: {' -> '.join(p.name for p in including)} -> {path.name}"
        )
    values = _read_yaml(path)
    bases = values.pop("base", [])
    names = [bases] if isinstance(bases, str) else bases
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: base is {bases!r}: it must name a file or a list of files")
    return OmegaConf.merge(*(_read(path.parent / name, (*including, path.resolve())) for name in names), values)


def _read_yaml(path: Path) -> Any:
    try:
        values = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(values):
        raise ConfigError(f"{path}: a config is a mapping of keys to values")
    return values


def _override(text: str) -> Any:
    key, equals, _ = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {text!r}: write it as key.sub=value")
    try:
        return OmegaConf.from_dotlist([text])
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {text!r}: {' '.join(str(error).split())}") from None


def _explain(error: Any) -> str:
    path = [str(part) for part in error["loc"] if isinstance(part, str | int) and not _is_union_tag(part)]
    name = ".".join(path)
    match error["type"]:
        case "missing":
            return f"{name} is missing: a value is needed there"
        case _ if not path:
            return f"the config cannot be read: {error['msg']}"
        case "unexpected_keyword_argument" | "extra_forbidden":
            names = _field_names(path[:-1])
            near = difflib.get_close_matches(path[-1], names, n=1, cutoff=0.5)
            hint = f"did you mean {'.'.join([*path[:-1], near[0]])}?" if near else f"valid keys: {', '.join(names)}"
            return f"{name} is not a setting; {hint}"
        case "dataclass_type":
            return f"{name} is {error['input']!r}: it must hold keys of its own: {', '.join(_field_names(path))}"
        case "value_error":
            return str(error["ctx"]["error"])
        case _:
            valid = error["msg"].removeprefix("Input should be ").removeprefix("Input ")
            return f"{name} is {error['input']!r}: it should be {valid}"


def _is_union_tag(part: object) -> bool:
    """pydantic adds the tried member of a union to the location (`int`, `list[...]`, a class): no key of ours."""
    return isinstance(part, str) and (not part.isidentifier() or part in ("int", "float", "MLASettings"))


def dataclasses_in(hint: Any) -> Iterator[Any]:
    """The dataclasses that a type is made of."""
    if is_dataclass(hint):
        yield hint
    for inner in get_args(hint):
        yield from dataclasses_in(inner)


def _field_names(path: Sequence[str]) -> list[str]:
    cls: Any = RunConfig
    for part in path:
        if part.isdecimal():  # a place in a list
            continue
        cls = next(dataclasses_in(get_type_hints(cls).get(part)), None)
        if cls is None:
            return []
    return [f.name for f in fields(cls)]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple | list) else value


def _forbid_unknown_keys(cls: Any) -> None:
    cls.__pydantic_config__ = ConfigDict(extra="forbid")
    for hint in get_type_hints(cls).values():
        for inner in dataclasses_in(hint):
            _forbid_unknown_keys(inner)


_forbid_unknown_keys(RunConfig)
_ADAPTER = TypeAdapter(RunConfig)
