"""The manifest of prepared data: counts and checksums of the files in the folder."""

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
TOKENIZERS = ("tokenizer.json", TOKENIZER, "tokenizer.tiktoken")  # Hugging Face's, SentencePiece's, tiktoken's
TOKENIZER_CONFIG = "tokenizer_config.json"  # beside those that are not SentencePiece's: which token ends a document
FORMAT = "coe_megatron.data"
VERSION = 2
SPLIT_FILES = ("train.bin", "train.idx", "valid.bin", "valid.idx")
DATA_FILES = (*SPLIT_FILES, TOKENIZER)
TOKEN_BYTES = {"uint16": 2, "int32": 4}
INDEX_HEADER_BYTES, INDEX_BYTES = 42, 20  # of Megatron's .idx: fixed, and per document
_MAX_BYTES = 1 << 22  # of a manifest; usually some hundred bytes, and the names of the inputs

# Strict: no preparation writes another JSON type, or a number out of these ranges.
Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 63)]
Positive = Annotated[int, Field(strict=True, ge=1, lt=1 << 63)]
Measure = Annotated[float, Field(strict=True, ge=0, lt=1e9, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class SplitSummary:
    """Statistics of one split.

    Attributes:
        documents: number of documents.
        tokens: number of tokens, including the eos of each document.
        bytes: size of the documents in UTF-8.
        unigram_entropy_nats: entropy of the token frequencies: the best loss of a model that ignores context.
        bytes_per_token: converts a loss per token to a loss per byte.
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
    """Everything needed to use prepared data and to reproduce it; equal inputs give an equal manifest.

    Attributes:
        vocab_size: pieces of the tokenizer.
        token_dtype: dtype of a token in .bin, "uint16" or "int32".
        tokenizer_sha256: identity of the tokenizer: the SHA-256 of its file, or `tokenizer_identity`.
        template: templates of a document; a record used the first whose fields it had.
        seed: seed of the split and of the built-in corpus.
        source: names of the input files or number of built-in problems, and how validation was chosen.
        malformed: number of skipped malformed records.
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

    @property
    def tokenizer(self) -> str:
        """Name of the tokenizer's file."""
        return _tokenizer_of(self.files)

    def write(self, folder: Path) -> None:
        """Write manifest.json into a folder."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path, name: str = "the data") -> "Manifest":
        """Read the manifest of a folder, and check the file sizes and the tokenizer's checksum against it.

        Args:
            name: the setting that names the folder, for messages.

        Raises:
            ConfigError: the manifest is missing or not valid; a file is missing, cannot be read or has a different
                size; or the tokenizer is a different one.
        """
        if kind_of(folder, name) is None or kind_of(require_folder(folder, name) / MANIFEST, name) is None:
            raise ConfigError(
                f"{name}: {folder} is not prepared data: it has no {MANIFEST} (launch/prepare_data.py creates one)"
            )
        path = folder / MANIFEST
        content = read_limited(path, name, _MAX_BYTES)
        try:
            manifest = cls._from_json(parse_json(content))
        except ValueError as error:
            message = f"{path} is not a manifest of format {FORMAT}, version {VERSION}: {_reason(error)}"
            raise ConfigError(f"{name}: {message}") from error
        manifest._check_sizes(folder, name)
        for file in tokenizer_files(manifest.tokenizer):
            if manifest._summarize(folder, file, name).sha256 != manifest.files[file].sha256:
                raise ConfigError(f"{name}: {folder / file} is not the tokenizer this data was prepared with")
        return manifest

    def check(self, folder: Path, file: str, name: str = "the data") -> None:
        """Check the SHA-256 of a file against the manifest; reads the complete file.

        Raises:
            ConfigError: the file has changed since it was prepared.
        """
        if self._summarize(folder, file, name) != self.files[file]:
            raise ConfigError(
                f"{name}: {folder} is damaged: {file} has changed since it was prepared; prepare it again"
            )

    def verify(self, folder: Path) -> None:
        """Check every file.

        Raises:
            ConfigError: a file has changed since it was prepared.
        """
        for file in self.files:
            self.check(folder, file)

    @classmethod
    def _from_json(cls, content: Any) -> "Manifest":
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        found = content.pop("format", None), content.pop("version", None)
        if found != (FORMAT, VERSION):
            format_, version = (shortened(repr(each), 50) for each in found)
            raise ValueError(f"it is format {format_}, version {version}")
        _require_keys(content, _names(cls), "it")
        files = (*SPLIT_FILES, *tokenizer_files(_tokenizer_of(content["files"])))
        for place, kind, keys in (("splits", SplitSummary, get_args(Split)), ("files", FileSummary, files)):
            _require_keys(content[place], keys, place)
            for key in keys:
                _require_keys(content[place][key], _names(kind), f"{place}.{key}")
        manifest = _validator().validate_python(content)
        manifest._check_numbers()
        return manifest

    def _check_numbers(self) -> None:
        """Check that its numbers are consistent with each other."""
        if self.token_dtype != ("uint16" if self.vocab_size < 65500 else "int32"):  # Megatron's own choice
            raise ValueError(f"token_dtype is {self.token_dtype}, which does not fit vocab_size {self.vocab_size}")
        if self.tokenizer_sha256 != tokenizer_identity(
            *(self.files[it].sha256 for it in tokenizer_files(self.tokenizer))
        ):
            raise ValueError(f"tokenizer_sha256 differs from that of {self.tokenizer} in files")
        for split, summary in self.splits.items():
            expected = summary.tokens * TOKEN_BYTES[self.token_dtype]
            if (found := self.files[f"{split}.bin"].bytes) != expected:
                raise ValueError(f"{split}.bin has {found} bytes, but its number of tokens requires {expected}")
            expected = INDEX_HEADER_BYTES + INDEX_BYTES * summary.documents
            if (found := self.files[f"{split}.idx"].bytes) != expected:
                raise ValueError(f"{split}.idx has {found} bytes, but its number of documents requires {expected}")

    def _check_sizes(self, folder: Path, name: str) -> None:
        for file in self.files:
            path, expected = folder / file, self.files[file].bytes
            message = f"{name}: {folder} is incomplete: {file}"
            if kind_of(path, name) is None:
                raise ConfigError(f"{message} is missing; prepare it again")
            if (size := require_file(path, name).stat().st_size) != expected:
                raise ConfigError(f"{message} has {size} bytes instead of {expected}; prepare it again")

    def _summarize(self, folder: Path, file: str, name: str) -> FileSummary:
        try:
            return FileSummary.of(folder / file)
        except OSError as error:
            raise problem(folder / file, name, error) from None


def tokenizer_files(tokenizer: str) -> tuple[str, ...]:
    """Names of the files that make up the tokenizer whose own file has this name."""
    return (tokenizer,) if tokenizer == TOKENIZER else (tokenizer, TOKENIZER_CONFIG)


def tokenizer_identity(model: str, config: str | None = None) -> str:
    """Identity of a tokenizer: the SHA-256 of its file, or of the two SHA-256 of its file and its configuration."""
    return model if config is None else hashlib.sha256(f"{model} {config}".encode()).hexdigest()


def _tokenizer_of(files: Any) -> str:
    """The tokenizer's file among the names of a folder's files; that of SentencePiece if there is none."""
    return next((name for name in TOKENIZERS if isinstance(files, dict) and name in files), TOKENIZER)


@cache
def _validator() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


def _names(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def _require_keys(value: Any, wanted: Collection[str], place: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is not a JSON object")
    if missing := set(wanted) - value.keys():
        raise ValueError(f"{place} has no {min(missing)}")
    if unknown := value.keys() - set(wanted):
        raise ValueError(f"{place} has the unknown key {shortened(repr(min(unknown)), 50)}")


def _reason(error: ValueError) -> str:
    return shortened(first_of(error) if isinstance(error, ValidationError) else str(error))
