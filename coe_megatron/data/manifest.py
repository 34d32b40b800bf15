"""The manifest of prepared data: what stands in the folder, counted and checksummed."""

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import FailFast, Field, TypeAdapter, ValidationError

from coe_megatron.errors import ConfigError
from coe_megatron.files import kind_of, problem, read_limited, require_file, require_folder
from coe_megatron.parsing import first_of, parse_json
from coe_megatron.text import shortened

Split = Literal["train", "valid"]

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
FORMAT = "coe_megatron.data"
VERSION = 2
DATA_FILES = ("train.bin", "train.idx", "valid.bin", "valid.idx", TOKENIZER)
TOKEN_BYTES = {"uint16": 2, "int32": 4}
INDEX_HEADER_BYTES, INDEX_BYTES = 42, 20  # of .idx as Megatron writes it: in all, and for each document
_MOST_BYTES = 1 << 22  # of a manifest; it has some hundred, and the names of the inputs

# Strict: what JSON writes as another type, or beyond what a file or a processor holds, no preparation wrote.
Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 63)]
Positive = Annotated[int, Field(strict=True, ge=1, lt=1 << 63)]
Measure = Annotated[float, Field(strict=True, ge=0, lt=1e9, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class SplitSummary:
    """One split in numbers.

    Attributes:
        documents: how many documents.
        tokens: how many tokens, the eos of each document included.
        bytes: of the documents' text in UTF-8.
        unigram_entropy_nats: of the tokens' own frequencies: the loss of the best model that ignores context.
        bytes_per_token: to turn a loss in nats a token into one a byte.
    """

    documents: Positive
    tokens: Positive
    bytes: Positive
    unigram_entropy_nats: Measure
    bytes_per_token: Annotated[Measure, Field(gt=0)]


@dataclass(frozen=True)
class FileSummary:
    """Size in bytes and SHA-256 (hexadecimal) of one file of the folder."""

    bytes: Positive
    sha256: Sha256

    @classmethod
    def of(cls, path: Path) -> "FileSummary":
        """Measure a file.

        Raises:
            OSError: it cannot be read.
        """
        with path.open("rb") as stream:
            return cls(path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())


@dataclass(frozen=True)
class Manifest:
    """Everything needed to use prepared data and to make it again; equal inputs give an equal manifest.

    Attributes:
        vocab_size: pieces of the tokenizer.
        token_dtype: how .bin stores a token, "uint16" or "int32".
        tokenizer_sha256: identity of the tokenizer.
        template: how a record became a document: by the first of these whose fields it had.
        seed: of the split and of the built-in corpus.
        source: names of the input files or the count of built-in problems, and how validation was chosen.
        malformed: records that were skipped because they gave no document.
        splits: summaries of "train" and "valid".
        files: sizes and checksums of the other files in the folder.
    """

    vocab_size: Annotated[Positive, Field(lt=1 << 31)]
    token_dtype: Literal["uint16", "int32"]
    tokenizer_sha256: Sha256
    template: Annotated[list[str], FailFast()]
    seed: Annotated[int, Field(strict=True, ge=0)]
    source: dict[str, Any]
    malformed: Count
    splits: dict[str, SplitSummary]
    files: dict[str, FileSummary]

    def write(self, folder: Path) -> None:
        """Write manifest.json into a folder."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path, name: str = "the data") -> "Manifest":
        """Read the manifest of a folder and compare the sizes of the files, and the tokenizer's checksum, with it.

        Args:
            name: of the setting that names the folder, for messages.

        Raises:
            ConfigError: there is no manifest, it is not ours, a file is missing, cannot be read or has another size, or
                the tokenizer is another.
        """
        if kind_of(folder, name) is None or kind_of(require_folder(folder, name) / MANIFEST, name) is None:
            raise ConfigError(
                f"{name}: {folder} is no prepared data: it has no {MANIFEST} (launch/prepare_data.py makes one)"
            )
        path = folder / MANIFEST
        content = read_limited(path, name, _MOST_BYTES)
        try:
            manifest = cls._from_json(parse_json(content))
        except ValueError as error:
            said = f"{path} is no manifest of format {FORMAT}, version {VERSION}: {_reason(error)}"
            raise ConfigError(f"{name}: {said}") from error
        manifest._check_sizes(folder, name)
        if manifest._measured(folder, TOKENIZER, name).sha256 != manifest.tokenizer_sha256:
            raise ConfigError(f"{name}: {folder / TOKENIZER} is not the tokenizer this data was prepared with")
        return manifest

    def check(self, folder: Path, file: str, name: str = "the data") -> None:
        """Compare the SHA-256 of a file of the folder with the manifest; reads all of it.

        Raises:
            ConfigError: it has other content than when it was prepared.
        """
        if self._measured(folder, file, name) != self.files[file]:
            raise ConfigError(
                f"{name}: {folder} is damaged: {file} has changed since it was prepared; prepare it again"
            )

    def verify(self, folder: Path) -> None:
        """`check` every file.

        Raises:
            ConfigError: a file has other content than when it was prepared.
        """
        for file in self.files:
            self.check(folder, file)

    @classmethod
    def _from_json(cls, content: Any) -> "Manifest":
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        found = content.pop("format", None), content.pop("version", None)
        if found != (FORMAT, VERSION):
            raise ValueError(f"it is format {found[0]!r:.50}, version {found[1]!r:.50}")
        _require_keys(content, _names(cls), "it")
        for place, kind, keys in (("splits", SplitSummary, get_args(Split)), ("files", FileSummary, DATA_FILES)):
            _require_keys(content[place], keys, place)
            for key in keys:
                _require_keys(content[place][key], _names(kind), f"{place}.{key}")
        manifest = _validator().validate_python(content)
        manifest._check_numbers()
        return manifest

    def _check_numbers(self) -> None:
        """That its numbers are of one folder: what follows from others must be so."""
        if self.token_dtype != ("uint16" if self.vocab_size < 65500 else "int32"):  # Megatron's own choice
            raise ValueError(f"token_dtype is {self.token_dtype}, with vocab_size {self.vocab_size}")
        if self.tokenizer_sha256 != self.files[TOKENIZER].sha256:
            raise ValueError(f"tokenizer_sha256 is another than that of {TOKENIZER} in files")
        for split, summary in self.splits.items():
            expected = summary.tokens * TOKEN_BYTES[self.token_dtype]
            if (found := self.files[f"{split}.bin"].bytes) != expected:
                raise ValueError(f"{split}.bin has {found} bytes, and {expected} by the number of its tokens")
            expected = INDEX_HEADER_BYTES + INDEX_BYTES * summary.documents
            if (found := self.files[f"{split}.idx"].bytes) != expected:
                raise ValueError(f"{split}.idx has {found} bytes, and {expected} by the number of its documents")

    def _check_sizes(self, folder: Path, name: str) -> None:
        for file in DATA_FILES:
            path, expected = folder / file, self.files[file].bytes
            said = f"{name}: {folder} is not whole: {file}"
            if kind_of(path, name) is None:
                raise ConfigError(f"{said} is missing; prepare it again")
            if (size := require_file(path, name).stat().st_size) != expected:
                raise ConfigError(f"{said} has {size} bytes instead of {expected}; prepare it again")

    def _measured(self, folder: Path, file: str, name: str) -> FileSummary:
        try:
            return FileSummary.of(folder / file)
        except OSError as error:
            raise problem(folder / file, name, error) from None


@cache
def _validator() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


def _names(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def _require_keys(value: Any, wanted: Collection[str], place: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is no JSON object")
    if missing := set(wanted) - value.keys():
        raise ValueError(f"{place} has no {min(missing)}")
    if unknown := value.keys() - set(wanted):
        raise ValueError(f"{place} has {min(unknown)!r:.50}, which is no part of it")


def _reason(error: ValueError) -> str:
    return shortened(first_of(error) if isinstance(error, ValidationError) else str(error))
