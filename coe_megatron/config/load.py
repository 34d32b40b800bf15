"""Load a RunConfig from YAML and overrides, and check it; every error is one line that names the field."""

import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, fields, is_dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError
from yaml import YAMLError

from coe_megatron import parsing
from coe_megatron.config.checks import check
from coe_megatron.config.describe import should_be
from coe_megatron.config.packaged import find
from coe_megatron.config.settings import RunConfig
from coe_megatron.errors import ConfigError
from coe_megatron.files import expand_user, read_limited, require_file
from coe_megatron.text import shortened

Settings = TypeVar("Settings")


_MOST_FILES = 64  # of one config, including its bases
_FEW_FOLDERS = 16  # with so few paths, a config cannot exceed its size limit
_LONGEST_OVERRIDE = 1 << 14
_LONGEST_TEXT = 1 << 12  # of one setting, after references are resolved
_REFERENCE = re.compile(r"\$\{(.*?)\}")
_VARIABLE = re.compile(r"oc\.env:(\w+)(,[^,]*)?")  # name and default value
_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")


def load(path: str | Path, overrides: Sequence[str] = (), world_size: int | None = None) -> RunConfig:
    """Read a config.

    Args:
        path: YAML file with the fields of RunConfig; omitted fields have their defaults. The key `base` names one file
            or a list of files, relative to this one, to inherit settings from; later files override earlier ones. A
            file that does not exist may be a packaged config (`quickstart.yaml`).
        overrides: `key.sub=value`, with the value as in YAML; they override the file. A number is an index in a list.
        world_size: number of ranks, if known, to check layout and batch.

    Raises:
        ConfigError: one line that names the field, its value and what would be valid.
    """
    return resolve(read(Path(path)), overrides, world_size, str(path))


def resolve(
    values: Any, overrides: Sequence[str] = (), world_size: int | None = None, source: str = "the config"
) -> RunConfig:
    """Apply overrides to what `read` returned, and check the result; arguments and errors as for `load`.

    Args:
        source: name of the config in messages.
    """
    values = deepcopy(values)
    for text in overrides:
        _override(values, text)
    config = parse(plain(values, source))
    check(config, world_size)
    if len(config.data.blend or ()) + len(config.data.validation or ()) > _FEW_FOLDERS:
        size = len(dump(config).encode())
        if size > parsing.CONFIG_BYTES:
            raise ConfigError(
                f"{source}: data.blend and data.validation have too many folders, or paths that are too long: the "
                f"resolved config has {size:,} bytes, and {parsing.CONFIG_BYTES:,} are allowed"
            )
    return config


def plain(values: Any, source: str) -> Any:
    """Convert OmegaConf's containers to dicts and lists, and resolve references to other keys."""
    check_references(OmegaConf.to_container(values), source)
    try:
        resolved = OmegaConf.to_container(values, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_omegaconf_message(error, 'it', 'has no value')}") from None
    for key, value in _leaves(resolved, ""):
        if "${" in str(value):  # in config.yaml it would be read as a reference
            raise ConfigError(f"{source}: {shortened(key)} is {shown(value)}: ${{ is allowed only in references")
    return resolved


def check_references(values: Any, source: str) -> None:
    """Check that each reference names a value without references or an environment variable, so that text stays short.

    Raises:
        ConfigError: one line that names the key. OmegaConf reports other errors in references.
    """
    leaves = {key: str(value) for key, value in _leaves(values, "")}
    for key, text in leaves.items():
        if "${" in key:
            raise ConfigError(f"{source}: {shown(key)} is not a setting: only values may have references")
        if "${" not in text:
            continue
        size, prefix = len(text), f"{source}: {shortened(key)} is {shown(text)}"
        for name in _REFERENCE.findall(text):
            if variable := _VARIABLE.fullmatch(name):
                size += len(os.environ.get(variable[1], ""))
                continue
            if not _NAME.fullmatch(name):
                raise ConfigError(f"{prefix}: a reference is ${{key.sub}} or ${{oc.env:VARIABLE}}")
            if name not in leaves and any(other.startswith(f"{name}.") for other in leaves):
                raise ConfigError(f"{prefix}: {shortened(name)} is a section, but a reference must name a value")
            if "${" in leaves.get(name, ""):
                raise ConfigError(f"{prefix}: {shortened(name)} is a reference itself; refer to the value it names")
            size += len(leaves.get(name, ""))
        if size > _LONGEST_TEXT:
            raise ConfigError(f"{source}: {shortened(key)} has references to more than {_LONGEST_TEXT:,} characters")


def _leaves(values: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """All values except sections and lists, by dotted key."""
    if isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def parse(values: Any) -> RunConfig:
    """Convert a nested dict to a RunConfig; ConfigError for unknown keys, wrong types and invalid values."""
    return parse_as(RunConfig, values)


def parse_as(cls: type[Settings], values: Any) -> Settings:
    """Convert a nested dict to a dataclass of settings; raises as `parse`."""
    key: Any = cls  # mypy believes that the class is not hashable, as its instances are not
    try:
        found = _adapter(key).validate_python(values)
    except ValidationError as error:
        # A misspelt required key is also reported as missing; report the misspelling, which is more helpful.
        reported = min(error.errors(), key=lambda found: found["type"] == "missing")
        raise ConfigError(_explain(cls, reported)) from None
    for problem in _misread(values, asdict(found)):
        raise ConfigError(problem)
    return found


def flat(config: RunConfig) -> dict[str, Any]:
    """Every setting by its dotted name, such as `moe.topk`."""
    return dict(_flat(asdict(config), ""))


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def dump(config: RunConfig) -> str:
    """The complete config as YAML, which `load` reads to an equal config."""
    return parsing.to_yaml(_without_tuples(asdict(config)))


def read(
    path: Path,
    key: str = "base",
    prepare: Callable[[Path, Any], Any] = lambda _path, values: values,
) -> Any:
    """Read a file's settings, merged over those of its bases, without checks; each file is read once.

    Args:
        key: the key that names the bases.
        prepare: called with each file's path and own settings; returns the settings to use.

    Raises:
        ConfigError: one line that names the file and what is wrong with it.
    """
    return _Files(key, prepare).read(find(path), "the config file", ())


def read_all(source: str, paths: Sequence[Path]) -> Any:
    """Merge the settings of several files, later ones over earlier ones; size limits apply to all of them in total.

    Args:
        source: the key that names the files.

    Raises:
        ConfigError: as `read`, or a key has incompatible types in two files.
    """
    files = _Files("base", lambda _path, values: values)
    return merge(source, *(files.read(path, source, ()) for path in paths))


class _Files:
    """Reads the files of one config; size limits apply to all of them in total."""

    def __init__(self, key: str, prepare: Callable[[Path, Any], Any]) -> None:
        self._key, self._prepare = key, prepare
        self._read: dict[Path, Any] = {}
        self._nodes = 0

    def read(self, path: Path, name: str, including: tuple[Path, ...]) -> Any:
        """The settings of a file, merged over those of its bases.

        Args:
            name: the key or argument that names the file, for messages.
            including: the files that include this one, outermost first.
        """
        require_file(path, name)
        where = Path(os.path.realpath(path))
        if where in including:
            names = " -> ".join(each.name for each in (*including, where))
            raise ConfigError(f"{path}: {self._key} leads back to this file: {names}")
        if where not in self._read:
            if len(self._read) + len(including) >= _MOST_FILES:
                raise ConfigError(f"{path}: {self._key} leads to more than {_MOST_FILES} files")
            self._read[where] = self._over_bases(path, (*including, where))
        return self._read[where]

    def _over_bases(self, path: Path, above: tuple[Path, ...]) -> Any:
        values, nodes = _read_yaml(path)
        self._nodes += nodes
        if self._nodes > parsing.MOST_NODES:
            raise ConfigError(f"{path}: including {self._key} it has more than {parsing.MOST_NODES:,} keys")
        try:
            values = self._prepare(path, values)
            bases = plain(OmegaConf.create({self._key: values.pop(self._key, [])}), str(path))[self._key]
        except OmegaConfBaseException as error:
            raise ConfigError(f"{path}: {_omegaconf_message(error, self._key, 'has no value')}") from None
        names = [bases] if isinstance(bases, str) else bases
        if not isinstance(names, Sequence) or not all(isinstance(name, str) and name for name in names):
            raise ConfigError(f"{path}: {self._key} is {shown(bases)}: it must name a file or a list of files")
        source = f"{self._key} in {path}"
        paths = [find(Path(_expanded(name, source)), path.parent) for name in dict.fromkeys(names)]
        found = [self.read(base, source, above) for base in paths]
        return merge(str(path), *found, values)


def _expanded(text: str, source: str) -> str:
    try:
        return expand_user(text)
    except ConfigError as error:
        raise ConfigError(f"{source} is {error}") from None


def merge(source: str, *given: Any) -> Any:
    """Merge settings, later ones over earlier ones; ConfigError if a key has incompatible types."""
    try:
        return OmegaConf.merge(*given)
    except (OmegaConfBaseException, TypeError) as error:  # for example, a section instead of a list
        raise ConfigError(
            f"{source}: it is not compatible with the settings it changes: {_first_line(error)}"
        ) from None


def _read_yaml(path: Path) -> tuple[Any, int]:
    """The settings in a file, as an OmegaConf container, and its number of nodes."""
    content = read_limited(path, "the config file", parsing.CONFIG_BYTES)
    try:
        text = content.decode("utf-8-sig")
        nodes = parsing.check_yaml(text)
        values = OmegaConf.create(text) if nodes > 1 else None  # a single value is not a config
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read: it must be text in UTF-8 ({error.reason})") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_omegaconf_message(error, 'its YAML', 'is not valid')}") from None
    except (YAMLError, ValueError, RecursionError) as error:  # ValueError: for example, a number of thousands of digits
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(values) or not values:
        raise ConfigError(f"{path}: a config must be a mapping of keys to values, such as model: {{num_layers: 4}}")
    return values, nodes


def _override(values: Any, text: str) -> None:
    """Apply an override; keys may contain list indices (`data.blend.0.path=...`)."""
    key, equals, _ = text.partition("=")
    if len(text) > _LONGEST_OVERRIDE:
        raise ConfigError(f"override {shown(text)}: it has more than {_LONGEST_OVERRIDE:,} characters")
    if not equals or not _KEY.fullmatch(key) or len(re.split(r"[.\[]", key)) > parsing.DEEPEST:
        raise ConfigError(f"override {shown(text)}: write it as key.sub=value")
    if key == "base":
        raise ConfigError(f"override {shown(text)}: base is allowed only in a config file")
    if problem := _index_problem(values, re.findall(r"[^.\[\]]+", key)):
        raise ConfigError(f"override {shown(text)}: {problem}")
    try:
        OmegaConf.update(values, key, _value(text))
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError, IndexError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"override {shown(text)}: write it as key.sub=value, the value as in YAML ({reason})"
        ) from None


@lru_cache(maxsize=1 << 12)  # a study has the same ones for many arms; `OmegaConf.update` copies what it is given
def _value(override: str) -> Any:
    """The value of an override; raises as OmegaConf and `check_yaml`."""
    key, _, given = override.partition("=")
    parsing.check_yaml(given)
    value: Any = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
    for _ in re.split(r"[.\[]", key):
        (value,) = value.values()
    return value


def _index_problem(values: Any, path: Sequence[str]) -> str:
    """A message if a path contains an index that is out of range for its list; otherwise empty."""
    for depth, part in enumerate(path):
        if OmegaConf.is_list(values) and part.isdecimal() and (len(part) > 9 or int(part) >= len(values)):
            entries = {0: "no entries", 1: "one entry (0)"}
            return f"{'.'.join(path[:depth])} has {entries.get(n := len(values), f'{n} entries (0 to {n - 1})')}"
        try:
            values = values[int(part) if OmegaConf.is_list(values) else part]
        except (OmegaConfBaseException, ValueError, TypeError, LookupError):  # the caller reports other errors
            break
    return ""


def _explain(cls: type, error: Any) -> str:
    *above, last = error["loc"] or ("",)
    path = [str(part) for part in above if not _is_union_tag(part)]
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden", "invalid_key"):
        return _unknown(cls, path, error["input"] if error["type"] == "invalid_key" else last)
    name = ".".join(path if _is_union_tag(last) else [*path, str(last)])
    match error["type"]:
        case "missing":
            return f"{name} is missing: a value is required"
        case "dataclass_type":
            names = ", ".join(_field_names(cls, name.split(".") if name else []))
            return f"{name or 'the config'} is {shown(error['input'])}: it must be a section with the keys {names}"
        case "value_error":
            message = str(error["ctx"]["error"])
            return f"{name} is {message}" if isinstance(error["input"], str) else message
        case kind if kind.endswith(("_parsing", "_type", "_from_float")):
            return f"{name} is {shown(error['input'])}: it should be {should_be(_hint(cls, name.split('.')))}"
        case _:
            should = re.sub(r"^\w+ should ", "should ", error["msg"])
            return f"{name} is {shown(error['input'])}: it {should}"


def _unknown(cls: type, path: Sequence[str], key: object) -> str:
    """The message for an unknown key of a section, also for a dotted key in YAML, which names no section."""
    names = _field_names(cls, path)
    name = ".".join([*path, key if isinstance(key, str) and key.isidentifier() and len(key) < 100 else shown(key)])
    near = [".".join([*path, close]) for close in difflib.get_close_matches(str(key)[:100], names, n=1, cutoff=0.5)]
    if not path and key in _ELSEWHERE.get(cls.__name__, {}):
        return f"{key} is not a setting of this kind of file: {_ELSEWHERE[cls.__name__][key]}"
    meant = " or ".join([found for found in _settings(cls) if found.rpartition(".")[2] == key] or near)
    hint = f"did you mean {meant}?" if meant else f"valid keys: {', '.join(names)}"
    return f"{name} is not a setting; {hint}"


def _hint(cls: Any, path: Sequence[str]) -> Any:
    """The type of a setting with its bounds; for an entry of a list or mapping, the type of the entry."""
    hint = cls
    for part in path:
        found = next((inner for inner in dataclasses_in(hint)), None)
        if found is not None and part in (hints := get_type_hints(found, include_extras=True)):
            hint = hints[part]
        else:
            listed = next(inner for inner in (hint, *get_args(hint)) if get_origin(inner) in (list, tuple, dict))
            hint = get_args(listed)[-1]
    return hint


def _settings(cls: Any) -> Iterator[str]:
    """The dotted names of all settings; N stands for a list index."""
    for name, hint in get_type_hints(cls).items():
        yield name
        prefix = f"{name}.N" if is_listed(hint) else name
        for inner in dataclasses_in(hint):
            yield from (f"{prefix}.{below}" for below in _settings(inner))


def _misread(given: Any, found: Any, name: str = "") -> Iterator[str]:
    """Report values that pydantic accepts but nobody intends: true as 1, and text that is empty or has line breaks."""
    if isinstance(given, dict):
        for key, value in given.items():
            yield from _misread(value, found[key], f"{name}.{key}" if name else key)
    elif isinstance(given, list):
        for index, (value, other) in enumerate(zip(given, found, strict=True)):
            yield from _misread(value, other, f"{name}.{index}")
    elif isinstance(given, bool) and found is not given:
        yield f"{name} is {shown(given)}: it should be a number"
    elif isinstance(found, str) and not (found.strip() and found.isprintable()):
        yield f"{name} is {shown(found)}: it should be text on one line"


def shown(value: object) -> str:
    """A value as in YAML, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return shortened(repr(value), 100)


def _omegaconf_message(error: OmegaConfBaseException, subject: str, predicate: str) -> str:
    return f"{shortened(error.full_key or subject)} {predicate}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return shortened(str(error).partition("\n")[0])


def _is_union_tag(part: object) -> bool:
    """Whether a part of a location is the member of a union (`int`, `list[...]`, a class), which pydantic adds."""
    return isinstance(part, str) and (not part.isidentifier() or part in ("int", "float", "str", "MLASettings"))


def dataclasses_in(hint: Any) -> Iterator[Any]:
    """The dataclasses in a type."""
    if isinstance(hint, type) and is_dataclass(hint):
        yield hint
    for inner in get_args(hint):
        yield from dataclasses_in(inner)


def is_listed(hint: Any) -> bool:
    """Whether a type, or a member of a union, is a list."""
    return list in (get_origin(hint), *map(get_origin, get_args(hint)))


def _field_names(cls: Any, path: Sequence[str]) -> list[str]:
    for part in path:
        if part.isdecimal():  # a list index
            continue
        cls = next(dataclasses_in(get_type_hints(cls).get(part)), None)
        if cls is None:
            return []
    return [f.name for f in fields(cls)]


def _without_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_tuples(inner) for key, inner in value.items()}
    return [_without_tuples(inner) for inner in value] if isinstance(value, tuple | list) else value


@cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    _forbid_unknown_keys(cls)
    return TypeAdapter(cls)


def _forbid_unknown_keys(cls: Any) -> None:
    cls.__pydantic_config__ = ConfigDict(extra="forbid")
    for hint in get_type_hints(cls).values():
        for inner in dataclasses_in(hint):
            _forbid_unknown_keys(inner)


_STUDY = "it is a study, for launch/study.py"
_RUN = "it is the config of a run, for launch/pretrain_coe.py, or for a study as its base"
_ELSEWHERE: dict[str, dict[object, str]] = {
    "RunConfig": dict.fromkeys(("axes", "base_study", "baseline", "budget", "seeds", "skip", "tune"), _STUDY),
    "StudySettings": dict.fromkeys((each.name for each in fields(RunConfig) if each.name != "output"), _RUN),
}
_KEY = re.compile(
    r"[^.\[\]$]+(\.[^.\[\]$]+|\[[^.\[\]$]+\])*"
)  # key.sub, or key[sub], which means the same in OmegaConf
