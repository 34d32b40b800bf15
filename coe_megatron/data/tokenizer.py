"""Tokenizers: train a lossless one with SentencePiece, or load one from a file of any kind."""

import hashlib
import io
import re
import zlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from coe_megatron.data.manifest import TOKENIZERS, tokenizer_identity
from coe_megatron.data.other_tokenizers import OtherTokenizer, Processor
from coe_megatron.errors import ConfigError
from coe_megatron.files import kind_of, problem, read_limited

ModelType = Literal["bpe", "unigram"]
OTHER_SUFFIXES = (".json", ".tiktoken")

PAD_ID, UNK_ID, BOS_ID, EOS_ID = range(4)
MAX_TRAINING_CHARACTERS = 64_000_000  # more text hardly changes the vocabulary, but costs gigabytes
MAX_LINE_LENGTH = 1 << 14  # characters; longer lines are split before sampling
CACHED_WORDS = 1 << 19  # about 100 MB
MAX_CACHED_LENGTH = 64  # characters of a cached word; text without spaces has "words" of any length
SEGMENT_LENGTH = 1 << 18  # characters that are split into words at a time
MAX_WORD_LENGTH = 1 << 16  # characters; SentencePiece needs some hundred bytes for each
MIN_VOCAB_SIZE = 261  # 256 bytes, 4 special pieces and a character
MAX_VOCAB_SIZE = (1 << 31) - 1  # SentencePiece counts in 32 bits
_MAX_MODEL_BYTES = 1 << 28  # a piece has about ten bytes
_SPACE = "\u2581"  # the space in pieces


class Tokenizer:
    """A SentencePiece model, a tokenizer.json of Hugging Face or a .tiktoken file, with what training needs of it.

    Attributes:
        vocab_size: the number of pieces (of other kinds the largest id plus 1); ids are 0 ... vocab_size - 1.
        eos_id: id that ends a document.
        pad_id: id that pads rows; eos_id if the model has no pad piece (masks distinguish them).
        sha256: its identity in hexadecimal: the SHA-256 of a model file; of other kinds see `tokenizer_identity`.
        config: what belongs into tokenizer_config.json beside a copy of the file; None for a SentencePiece model.
    """

    def __init__(
        self, path: str | Path, name: str = "the tokenizer", *, eos: str | None = None, encoding: str | None = None
    ) -> None:
        """Read a file, of the kind that its name says: .json, .tiktoken, or else a SentencePiece model.

        Args:
            name: the option or setting that names the file, for messages.
            eos, encoding: as in `OtherTokenizer`; a SentencePiece model needs neither.

        Raises:
            ConfigError: the file cannot be read, is not of its kind, or has no token that ends a document.
        """
        path = Path(path)
        model = read_limited(path, name, _MAX_MODEL_BYTES)
        self.config: str | None = None
        self._words: _Words | None = None
        self.sha256 = hashlib.sha256(model).hexdigest()
        if path.suffix in OTHER_SUFFIXES:
            self._processor: Processor = (other := OtherTokenizer(path, model, name, eos, encoding))
            self.config = other.config
            self.sha256 = tokenizer_identity(self.sha256, hashlib.sha256(other.config.encode()).hexdigest())
        else:
            self._open_sentencepiece(path, model, name)
        self.vocab_size: int = self._processor.vocab_size()
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise problem(path, name, "it has no end-of-sentence piece: train it with an eos_id")
        pad_id: int = self._processor.pad_id()
        self.pad_id = pad_id if pad_id >= 0 else self.eos_id

    def _open_sentencepiece(self, path: Path, model: bytes, name: str) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            if not model:
                raise RuntimeError("the file is empty")  # SentencePiece would accept it, and fail later
            self._processor = SentencePieceProcessor(model_proto=model)
            proto = parse_model(model)
        except (RuntimeError, UnicodeDecodeError) as error:  # the latter when SentencePiece's own message is not UTF-8
            raise problem(path, name, "it is not a SentencePiece model") from error
        self._words = _Words(self._processor) if _splits_at_spaces(proto) else None

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text [n] int32, without bos or eos, as the library encodes it.

        If words can be encoded separately with the same result (`_splits_at_spaces`), we cache the ids of words, since
        most words repeat. A word of more than MAX_WORD_LENGTH characters is split; ids can differ only at the splits.
        """
        if self._words is None:
            return np.array(self._processor.encode(text), dtype=np.int32)
        first_end = text.find(" ") % (len(text) + 1)  # -1 (no space) becomes the end
        ids = bytearray(self._words.encode(text[:first_end]))
        for segment in _segments(text, first_end + 1):
            ids += b"".join(map(self._words.__getitem__, segment.split(" ")))
        return np.frombuffer(ids, dtype=np.int32)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without control ids such as eos and pad."""
        return self._processor.decode(ids)


def find_tokenizer(path: Path, name: str) -> Path:
    """The tokenizer's file that a path names: the path itself, or the file in the folder at this path.

    Raises:
        ConfigError: the folder holds none, or the path cannot be accessed.
    """
    if kind_of(path, name) != "folder":
        return path
    found = next((path / file for file in TOKENIZERS if kind_of(path / file, name) is not None), None)
    if found is None:
        raise problem(path, name, f"it is a folder without {', '.join(TOKENIZERS[:-1])} or {TOKENIZERS[-1]}")
    return found


class _Words(dict[str, bytes]):
    """Cache from a word to the ids of a space and this word, as int32 bytes."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __missing__(self, word: str) -> bytes:
        ids = self.encode(f" {word}")
        if len(word) <= MAX_CACHED_LENGTH:
            if len(self) >= CACHED_WORDS:
                self.clear()
            self[word] = ids
        return ids

    def encode(self, word: str) -> bytes:
        """The ids of one word, encoded in parts of MAX_WORD_LENGTH characters."""
        starts = range(0, len(word), MAX_WORD_LENGTH)
        parts = (self._processor.encode(word[start : start + MAX_WORD_LENGTH]) for start in starts)
        return b"".join(array("i", ids).tobytes() for ids in parts)


def _segments(text: str, start: int) -> Iterator[str]:
    """Split a text from `start` on at spaces, into segments of about SEGMENT_LENGTH characters."""
    while start <= len(text):
        end = text.find(" ", start + SEGMENT_LENGTH) % (len(text) + 1)
        yield text[start:end]
        start = end + 1


def parse_model(model: bytes) -> Any:
    """The model as SentencePiece's protobuf message; RuntimeError, as from its processor, if it is not valid."""
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    try:
        proto = ModelProto.FromString(model)
    except DecodeError as error:
        raise RuntimeError(str(error)) from error
    if not all(isinstance(piece.piece, str) for piece in proto.pieces):  # protobuf returns bytes if it is not UTF-8
        raise RuntimeError("a piece is not UTF-8")
    return proto


def _splits_at_spaces(proto: Any) -> bool:
    """Whether the ids of a text are the concatenated ids of its words, each with the space before it.

    This holds for BPE if no piece contains a space except at its start, and nothing else works across spaces: no
    normalization, and byte fallback (otherwise adjacent unknown characters merge into one unknown piece).
    """
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    lossless = not (
        normalizer.precompiled_charsmap or normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces
    )
    plain = lossless and normalizer.escape_whitespaces and not trainer.treat_whitespace_as_suffix
    is_bpe = trainer.model_type == trainer.BPE and trainer.byte_fallback
    return plain and is_bpe and not any(_SPACE in piece.piece[1:] for piece in proto.pieces)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    path: str | Path,
    *,
    model_type: ModelType = "bpe",
    max_characters: int = MAX_TRAINING_CHARACTERS,
) -> Tokenizer:
    """Train a SentencePiece model, write it to `path`, and return it.

    The same texts give a byte-identical file. Text is not normalized and unknown characters fall back to bytes, so
    decode(encode(text)) == text (except for U+2581, SentencePiece's own space character). Each digit is its own piece.
    Ids: pad 0, unk 1, bos 2, eos 3.

    Args:
        texts: documents to train on.
        vocab_size: number of pieces, including the 256 bytes and the 4 special ones.
        path: of the model file to write.
        max_characters: limit of the text to train on; a longer text is sampled by line hash, to at least half of this.

    Raises:
        ConfigError: an option has no valid value, or the texts are too few or too varied for `vocab_size`; the message
            names the option `--vocab-size` and a valid value.
    """
    from sentencepiece import SentencePieceTrainer

    if model_type not in get_args(ModelType):
        raise ConfigError(f"model_type is {model_type!r}: it must be one of {', '.join(get_args(ModelType))}")
    lines = _sample(texts, max_characters)  # read here, because SentencePiece would hide an error of `texts`
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            **_fixed_options(),
        )
    except RuntimeError as error:
        raise ConfigError(f"--vocab-size is {vocab_size}: {_remedy(str(error))}") from error
    Path(path).write_bytes(model.getvalue())
    return Tokenizer(path)


def _fixed_options() -> dict[str, Any]:
    """Options that make a model lossless and reproducible."""
    ids: dict[str, Any] = {"pad_id": PAD_ID, "unk_id": UNK_ID, "bos_id": BOS_ID, "eos_id": EOS_ID}
    lossless = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "byte_fallback": True,
        "character_coverage": 0.9999,
    }
    fixed = {"num_threads": 1, "minloglevel": 2, "max_sentence_length": 1 << 30, "split_digits": True}
    return {**ids, **lossless, **fixed}


def _sample(texts: Iterable[str], max_characters: int) -> list[str]:
    """Lines of the texts with at most `max_characters` characters: all lines, or those with the smallest checksums.
    The sample is spread over the text and reproducible. NUL is removed, since it would end SentencePiece's input.
    """
    ceiling, size = 1 << 32, 0
    kept: list[tuple[int, str]] = []
    for line in _lines(texts):
        if (checksum := zlib.crc32(line.encode())) >= ceiling:
            continue
        kept.append((checksum, line))
        size += len(line)
        while size > max_characters:
            ceiling //= 2
            kept = [(checksum, line) for checksum, line in kept if checksum < ceiling]
            size = sum(len(line) for _, line in kept)
    return [line for _, line in kept]


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.replace("\0", "").split("\n"):
            yield from (line[start : start + MAX_LINE_LENGTH] for start in range(0, len(line), MAX_LINE_LENGTH))


def _remedy(message: str) -> str:
    """Translate an error of SentencePiece's trainer into a remedy for our option."""
    if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"the characters of the text require at least {needed[1]}"
    if (limit := re.search(r"too high .* <= (\d+)", message)) and int(limit[1]) >= MIN_VOCAB_SIZE:
        return f"the text allows at most {limit[1]}"
    if limit or "sentences_.empty()" in message:
        return "there is too little text to train any tokenizer"
    return f"SentencePiece cannot train this many pieces on the text: {message.rpartition('] ')[2].strip()}"
