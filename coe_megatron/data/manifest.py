"""The manifest of prepared data: what stands in the folder, counted and checksummed."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import TypeAdapter, ValidationError

Split = Literal["train", "valid"]

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
FORMAT = "coe_megatron.data"
VERSION = 2
DATA_FILES = ("train.bin", "train.idx", "valid.bin", "valid.idx", TOKENIZER)


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

    documents: int
    tokens: int
    bytes: int
    unigram_entropy_nats: float
    bytes_per_token: float


@dataclass(frozen=True)
class FileSummary:
    """Size in bytes and SHA-256 (hexadecimal) of one file of the folder."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileSummary":
        """Measure a file."""
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

    vocab_size: int
    token_dtype: str
    tokenizer_sha256: str
    template: list[str]
    seed: int
    source: dict[str, Any]
    malformed: int
    splits: dict[str, SplitSummary]
    files: dict[str, FileSummary]

    def write(self, folder: Path) -> None:
        """Write manifest.json into a folder."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a folder and compare the sizes of the files, and the tokenizer's checksum, with it.

        Raises:
            ValueError: there is no manifest, it is not ours, a file is missing or of another size, or the tokenizer is
                another.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{folder} is no prepared data: it has no {MANIFEST} (launch/prepare_data.py makes one)")
        try:
            manifest = cls._from_json(json.loads(path.read_bytes()))
        except ValidationError as error:
            first = error.errors()[0]
            said = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise ValueError(f"{path} is no manifest of format {FORMAT}, version {VERSION}: {said}") from error
        except ValueError as error:
            raise ValueError(f"{path} is no manifest of format {FORMAT}, version {VERSION}: {error}") from error
        manifest._check_sizes(folder)
        if FileSummary.of(folder / TOKENIZER).sha256 != manifest.tokenizer_sha256:
            raise ValueError(f"{folder / TOKENIZER} is not the tokenizer this data was prepared with")
        return manifest

    def verify(self, folder: Path) -> None:
        """Compare the SHA-256 of every file with the manifest; reads all of them.

        Raises:
            ValueError: a file has other content than when it was prepared.
        """
        for name, expected in self.files.items():
            if FileSummary.of(folder / name) != expected:
                raise ValueError(f"{folder / name} has changed since it was prepared: its SHA-256 differs")

    @classmethod
    def _from_json(cls, content: Any) -> "Manifest":
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        found = content.pop("format", None), content.pop("version", None)
        if found != (FORMAT, VERSION):
            raise ValueError(f"it is format {found[0]!r}, version {found[1]!r}")
        manifest = TypeAdapter(cls).validate_python(content)
        if missing := set(get_args(Split)) - manifest.splits.keys():
            raise ValueError(f"splits has no {min(missing)}")
        return manifest

    def _check_sizes(self, folder: Path) -> None:
        for name in DATA_FILES:
            size = (folder / name).stat().st_size if (folder / name).is_file() else None
            expected = self.files[name].bytes if name in self.files else None
            if size is None or size != expected:
                found = "is missing" if size is None else f"has {size} bytes instead of {expected}"
                raise ValueError(f"{folder} is not whole: {name} {found}; prepare it again")
