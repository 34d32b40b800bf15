"""The data that a run's settings name, checked without torch: complete, and all of one tokenizer.

A path is a folder of prepared data, or the prefix of an indexed dataset of Megatron (`indexed_prefix`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from coe_megatron.config.settings import BlendPart, DataSettings, RunConfig
from coe_megatron.data.indexed_prefix import IndexedPrefix, is_prefix
from coe_megatron.data.manifest import Manifest
from coe_megatron.errors import ConfigError
from coe_megatron.files import kind_of


@dataclass(frozen=True)
class DataFolder:
    """A folder or prefix, and the setting that names it (for messages)."""

    setting: str
    path: Path

    @property
    def is_prefix(self) -> bool:
        """Whether it is the prefix of an indexed dataset."""
        return is_prefix(self.path, self.setting)

    @property
    def exists(self) -> bool:
        """Whether there is anything of this name."""
        return self.is_prefix or kind_of(self.path, self.setting) is not None

    @property
    def without_tokenizer(self) -> str:
        """Why `model.vocab_size` is needed if this is all."""
        return f"{self.setting} is {self.path}, files of Megatron without a tokenizer, so that it must be set"

    def read(self) -> Manifest | IndexedPrefix:
        """Its manifest, or what the index of a prefix says.

        Raises:
            ConfigError: it is not prepared data and no prefix, or is incomplete; the message names the setting.
        """
        if self.is_prefix:
            return IndexedPrefix.read(self.path, self.setting)
        return Manifest.read(self.path, self.setting)


def training_parts(settings: DataSettings) -> list[BlendPart]:
    """The corpora to train on: `blend`, or `path` alone."""
    return list(settings.blend or [BlendPart(settings.path, 1.0)])


def validation_paths(settings: DataSettings) -> dict[str, str]:
    """The folders to validate on, by name."""
    if settings.validation is not None:
        return settings.validation
    if settings.blend is not None:
        return {Path(part.path).name: part.path for part in settings.blend}
    return {"valid": settings.path}


def data_folders(settings: DataSettings) -> Iterator[DataFolder]:
    """Every folder of a run."""
    if settings.blend is None:
        yield DataFolder("data.path", Path(settings.path))
    for index, part in enumerate(settings.blend or []):
        yield DataFolder(f"data.blend.{index}.path", Path(part.path))
    for name, path in (settings.validation or {}).items():
        yield DataFolder(f"data.validation.{name}", Path(path))


def missing_folders(settings: DataSettings) -> list[str]:
    """A line for each folder of a run that does not exist (yet)."""
    absent = (folder for folder in data_folders(settings) if not folder.exists)
    return [f"{folder.setting} is {folder.path}: there is no such folder, and the run needs it" for folder in absent]


def check_folders(settings: DataSettings, *, needed: bool) -> Manifest | None:
    """Read the manifest of every folder of a run, and the index of every prefix; returns one of the manifests, or None
    if no folder exists.

    Args:
        needed: whether a folder that does not exist is an error too.

    Raises:
        ConfigError: a folder is missing, damaged, or has a different tokenizer; a prefix is not valid, or is the only
            data to validate on; one line that names the setting.
    """
    first: tuple[DataFolder, Manifest] | None = None
    for folder in data_folders(settings):
        if not needed and not folder.exists:
            continue
        manifest = folder.read()
        if isinstance(manifest, IndexedPrefix):
            if settings.validation is None:
                raise ConfigError(
                    f"data.validation is null: {folder.setting} is {folder.path}, files of Megatron without a "
                    "validation split; name other files, or a prepared folder, in data.validation"
                )
            continue
        first = first or (folder, manifest)
        if manifest.tokenizer_sha256 != first[1].tokenizer_sha256:
            raise ConfigError(
                f"{folder.setting} is {folder.path}: its tokenizer differs from that of {first[0].setting} "
                f"({first[0].path}): prepare it with --tokenizer {first[0].path / first[1].tokenizer}"
            )
    return first[1] if first else None


def check_data(config: RunConfig, *, needed: bool) -> Manifest | None:
    """`check_folders`, and check that each training split fills at least one packed sample.

    Raises:
        ConfigError: as `check_folders`, or a packed sample is longer than a training split.
    """
    manifest = check_folders(config.data, needed=needed)
    length = config.model.seq_length
    for part in training_parts(config.data) if config.data.samples == "packed" else []:
        if not (folder := DataFolder("the data", Path(part.path))).exists:
            continue
        tokens = folder.read().splits["train"].tokens
        if tokens <= length:
            raise ConfigError(
                f"model.seq_length is {length}: packed samples need more tokens than {folder.path} has ({tokens})"
            )
    return manifest
