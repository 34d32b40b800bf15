"""Tokenizers of other libraries behind the methods of a SentencePiece processor: Hugging Face's and tiktoken's.

Special tokens that a text spells out are text, as SentencePiece has it: a document cannot forge an end of text.
"""

import base64
import binascii
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any, Protocol

from coe_megatron.data.manifest import TOKENIZER_CONFIG
from coe_megatron.data.records import InputError
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.extras import require
from coe_megatron.files import kind_of, problem, read_limited
from coe_megatron.parsing import JSON_BYTES, parse_json
from coe_megatron.text import shortened

_MAX_VOCABULARY = 1 << 24  # tokens are counted in an array of this size
_BYTES = {bytes([value]) for value in range(256)}
_DEEPEST = 64  # levels of a configuration, which may hold schemas of tools


class Processor(Protocol):
    """What `Tokenizer` needs of a library: the methods of SentencePiece's processor. An id below 0 stands for none."""

    def encode(self, text: str, /) -> list[int]: ...
    def decode(self, ids: list[int], /) -> str: ...
    def vocab_size(self) -> int: ...
    def eos_id(self) -> int: ...
    def pad_id(self) -> int: ...


class OtherTokenizer:
    """A `tokenizer.json` or a `.tiktoken` file as a `Processor`.

    Attributes:
        config: the content of the `tokenizer_config.json` that belongs beside a copy of the file: its roles.
    """

    def __init__(self, path: Path, content: bytes, name: str, eos: str | None, encoding: str | None) -> None:
        """Read a file of which the suffix says the kind, and the file tokenizer_config.json beside it, if there is one.

        Args:
            content: of the file.
            name: the option or setting that names the file, for messages.
            eos: the token that ends a document; None for that of tokenizer_config.json, or of tiktoken's encoding.
            encoding: tiktoken's name of the encoding; None for that of tokenizer_config.json, or the file's name.

        Raises:
            ConfigError: the file is not valid; it has no such token, or names none; the encoding is not known; or the
                library is not installed.
        """
        beside = _read_config(path.with_name(TOKENIZER_CONFIG), name)
        library = "tokenizers" if path.suffix == ".json" else "tiktoken"
        require(library)
        self._config: dict[str, Any] = {}
        try:
            with _panics():
                if library == "tokenizers":
                    self._library: _HuggingFace | _Tiktoken = _HuggingFace(content)
                else:
                    self._config["tiktoken_encoding"] = encoding or _token(beside, "tiktoken_encoding") or path.stem
                    self._library = _Tiktoken(content, self._config["tiktoken_encoding"])
                if not 1 <= self._library.vocab_size <= _MAX_VOCABULARY:
                    raise ValueError(f"its ids end at {self._library.vocab_size}")
        except ConfigError as error:
            raise problem(path, name, str(error)) from None
        except Exception as error:  # neither library documents what it raises on arbitrary bytes
            reason = shortened(one_line(" ".join(str(error).split()) or type(error).__name__))
            raise problem(path, name, f"it is not a file of {library} ({reason})") from error
        eos = eos or _token(beside, "eos_token") or self._library.end_of_text
        if eos is None:
            raise problem(path, name, f"no {TOKENIZER_CONFIG} beside it names its end-of-text token: use --eos TOKEN")
        if (found := self._library.token_id(eos)) is None:
            raise problem(path, name, f"it has no token {shortened(repr(eos), 50)} to end a document: use --eos TOKEN")
        pad = _token(beside, "pad_token")
        pad_id = self._library.token_id(pad) if pad is not None else None
        self._eos_id, self._pad_id = found, -1 if pad_id is None else pad_id
        self._config |= {"eos_token": eos} | ({} if pad_id is None else {"pad_token": pad})

    @property
    def config(self) -> str:
        roles = {"clean_up_tokenization_spaces": False, "split_special_tokens": True, **self._config}
        return json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **roles}, indent=2) + "\n"

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens.

        Raises:
            InputError: the library fails on the text (tiktoken does on millions of spaces in a row).
        """
        try:
            with _panics():
                return self._library.encode(text)
        except RuntimeError as error:
            raise InputError(
                f"a text cannot be encoded ({shortened(one_line(str(error)))}): {shortened(repr(text[:200]))}"
            ) from error

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens; bytes that are not UTF-8 are replaced."""
        return self._library.decode([id_ for id_ in ids if id_ not in (self._eos_id, self._pad_id)])

    def vocab_size(self) -> int:
        """The largest id plus 1: ids may have gaps."""
        return self._library.vocab_size

    def eos_id(self) -> int:
        """Id of the token that ends a document."""
        return self._eos_id

    def pad_id(self) -> int:
        """Id of the padding token; -1 if none is named."""
        return self._pad_id


class _HuggingFace:
    """A tokenizer.json; its truncation, padding and template of special tokens are not used."""

    end_of_text = None

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._tokenizer = require("tokenizers").Tokenizer.from_str(content.decode())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._content,)  # the library's own pickles forget `encode_special_tokens`

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def token_id(self, token: str) -> int | None:
        try:
            return self._tokenizer.token_to_id(token)
        except UnicodeEncodeError:  # JSON may hold half of a surrogate pair
            return None


class _Tiktoken:
    """A file of tiktoken: lines of a token in base64 and its id. The encoding has the pattern and special tokens."""

    end_of_text = "<|endoftext|>"

    def __init__(self, content: bytes, encoding: str) -> None:
        parts = _encoding_parts(_ranks(content), encoding)
        self._special: dict[str, int] = parts["special_tokens"]
        self._encoding = require("tiktoken").Encoding(**parts)
        self.vocab_size = self._encoding.max_token_value + 1

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        special = set(self._special.values())
        return self._encoding.decode([id_ for id_ in ids if id_ not in special])

    def token_id(self, token: str) -> int | None:
        return self._special.get(token)


def _ranks(content: bytes) -> dict[bytes, int]:
    """Tokens and ids of a tiktoken file; ValueError if it is not one."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"line {number} is not a token in base64 and its id") from None
    if not ranks.keys() >= _BYTES:
        raise ValueError("a byte has no token")
    if len(set(ranks.values())) < number or min(ranks.values()) < 0:
        raise ValueError("a token or an id occurs twice, or an id is negative")
    return ranks


def _encoding_parts(ranks: dict[bytes, int], encoding: str) -> dict[str, Any]:
    """Arguments of tiktoken's Encoding: the library's own, but with these ranks. The library has the patterns only in
    functions that also download the ranks, so we run the function with a loader that returns ours.

    Raises:
        ConfigError: the library has no such encoding.
    """
    constructors = {
        name: function
        for name, function in require("tiktoken_ext.openai_public").ENCODING_CONSTRUCTORS.items()
        if "load_tiktoken_bpe" in function.__code__.co_names
    }
    if (constructor := constructors.get(encoding)) is None:
        raise ConfigError(
            f"{shortened(repr(encoding), 50)} is no encoding whose pattern we know ({', '.join(constructors)}): "
            "name the file ENCODING.tiktoken, or use --encoding"
        )
    loader = {"load_tiktoken_bpe": lambda *_, **__: ranks}
    return FunctionType(constructor.__code__, {**constructor.__globals__, **loader})()


def _read_config(path: Path, name: str) -> dict[str, Any]:
    """A file tokenizer_config.json; empty if it does not exist."""
    if kind_of(path, name) is None:
        return {}
    try:
        config = parse_json(read_limited(path, name, JSON_BYTES), _DEEPEST)
    except ConfigError:
        raise
    except ValueError as error:
        raise problem(path, name, f"it is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise problem(path, name, "it is not a JSON object")
    return config


def _token(config: dict[str, Any], role: str) -> str | None:
    """A token of tokenizer_config.json, which is a string or an object with its content."""
    value = config.get(role)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


@contextmanager
def _panics() -> Iterator[None]:
    """Raise a panic of a library in Rust as a RuntimeError; it is no Exception, and its class cannot be imported."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(str(error)) from error
