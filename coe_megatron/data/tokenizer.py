"""SentencePiece tokenizers: training one that loses nothing, and reading one from a file."""

import hashlib
import io
import re
import zlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from coe_megatron.errors import ConfigError
from coe_megatron.files import problem, read_limited

ModelType = Literal["bpe", "unigram"]

PAD_ID, UNK_ID, BOS_ID, EOS_ID = range(4)
TRAINING_CHARACTERS = 64_000_000  # more text changes a vocabulary of usual size little, but costs gigabytes
LONGEST_LINE = 1 << 14  # characters that are in the sample together
REMEMBERED_WORDS = 1 << 19  # about 100 MB
REMEMBERED_LENGTH = 64  # characters of such a word; text without spaces has "words" of any length
PART_LENGTH = 1 << 18  # characters that are cut into words together
LONGEST_WORD = 1 << 16  # characters; SentencePiece takes some hundred bytes for each
SMALLEST_VOCABULARY = 261  # 256 bytes, 4 special pieces and a character
LARGEST_VOCABULARY = (1 << 31) - 1  # SentencePiece counts in 32 bits
_MODEL_BYTES = 1 << 28  # a piece has some ten bytes
_SPACE = "\u2581"  # how pieces write a space


class Tokenizer:
    """A SentencePiece model with the few things that training needs of it.

    Attributes:
        vocab_size: the number of pieces; ids are 0 ... vocab_size - 1.
        eos_id: the id that ends a document.
        pad_id: the id that fills rows up; a model without a pad piece lends its eos (masks tell them apart).
        sha256: of the model file, in hexadecimal: its identity.
    """

    def __init__(self, path: str | Path, name: str = "the tokenizer") -> None:
        """Read a model file.

        Args:
            name: of the option or setting that names it, for messages.

        Raises:
            ConfigError: the file cannot be read, is no SentencePiece model, or knows no end of sentence.
        """
        from sentencepiece import SentencePieceProcessor

        model = read_limited(Path(path), name, _MODEL_BYTES)
        try:
            if not model:
                raise RuntimeError("SentencePiece takes no bytes for no model, and fails later")
            self._processor = SentencePieceProcessor(model_proto=model)
            proto = _parsed(model)
        except (RuntimeError, UnicodeDecodeError) as error:  # the latter of its own message on what it cannot read
            raise problem(path, name, "it is no SentencePiece model") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise problem(path, name, "it has no end-of-sentence piece: train it with an eos_id")
        pad_id: int = self._processor.pad_id()
        self.pad_id = pad_id if pad_id >= 0 else self.eos_id
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._words = _Words(self._processor) if _splits_at_spaces(proto) else None

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text [n] int32, without bos or eos: SentencePiece's own, found word by word where that is
        the same (`_splits_at_spaces`), for most words of a text have been seen before.

        There, what has more than LONGEST_WORD characters without a space is cut; only at the cuts can ids differ.
        """
        if self._words is None:
            return np.array(self._processor.encode(text), dtype=np.int32)
        first_end = text.find(" ") % (len(text) + 1)  # -1, no space, becomes the end
        found = bytearray(self._words.encode(text[:first_end]))
        for part in _parts(text, first_end + 1):
            found += b"".join(map(self._words.__getitem__, part.split(" ")))
        return np.frombuffer(found, dtype=np.int32)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; control ids such as eos and pad vanish."""
        return self._processor.decode(ids)


class _Words(dict[str, bytes]):
    """Ids of words that follow a space, the space included, as int32 in memory; each looked up in the model once."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __missing__(self, word: str) -> bytes:
        ids = self.encode(f" {word}")
        if len(word) <= REMEMBERED_LENGTH:
            if len(self) >= REMEMBERED_WORDS:
                self.clear()
            self[word] = ids
        return ids

    def encode(self, word: str) -> bytes:
        """The ids of one word as it is, in as many parts as its length needs."""
        starts = range(0, len(word), LONGEST_WORD)
        parts = (self._processor.encode(word[start : start + LONGEST_WORD]) for start in starts)
        return b"".join(array("i", ids).tobytes() for ids in parts)


def _parts(text: str, start: int) -> Iterator[str]:
    """What stands between the spaces of a text from `start` on, in parts of about PART_LENGTH characters."""
    while start <= len(text):
        end = text.find(" ", start + PART_LENGTH) % (len(text) + 1)
        yield text[start:end]
        start = end + 1


def _parsed(model: bytes) -> Any:
    """The model as SentencePiece's own message; a RuntimeError, as of its processor, if it holds no text."""
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    try:
        proto = ModelProto.FromString(model)
    except DecodeError as error:
        raise RuntimeError(str(error)) from error
    if not all(isinstance(piece.piece, str) for piece in proto.pieces):  # bytes where it is not UTF-8
        raise RuntimeError("a piece is not UTF-8")
    return proto


def _splits_at_spaces(proto: Any) -> bool:
    """Whether the ids of a text are those of its words, each with the space before it, one after the other.

    So it is with BPE when no piece holds a space but at its start, and nothing else looks across a space: no
    normalisation, and bytes for unknown characters (which otherwise melt into one unknown piece).
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
    max_characters: int = TRAINING_CHARACTERS,
) -> Tokenizer:
    """Train a SentencePiece model, write it to `path`, and return it.

    The same texts give the same file, byte for byte. Nothing is normalized and unknown characters fall back to
    bytes, so decode(encode(text)) == text (but for U+2581, SentencePiece's own mark of a space). Digits stand alone.
    Ids: pad 0, unk 1, bos 2, eos 3.

    Args:
        texts: documents to learn from.
        vocab_size: pieces including the 256 bytes and the 4 special ones.
        path: where the model file goes.
        max_characters: of a longer text a sample is used, half as large as this at least, its lines chosen by hash.

    Raises:
        ConfigError: an option has no valid value, or the texts are too few or too varied for `vocab_size`; the message
            names `--vocab-size`, as the programs call it, and what would do.
    """
    from sentencepiece import SentencePieceTrainer

    if model_type not in get_args(ModelType):
        raise ConfigError(f"model_type is {model_type!r}: it must be one of {', '.join(get_args(ModelType))}")
    lines = _sample(texts, max_characters)  # read here: SentencePiece would disguise an error of the texts
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
    """What makes a model lossless and the same everywhere."""
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


def _sample(texts: Iterable[str], most: int) -> list[str]:
    """Lines of the texts with at most so many characters, all of them or those with the smallest checksums: a sample
    spread over the whole, the same for the same texts. NUL would end SentencePiece's input, so it is left out.
    """
    ceiling, size = 1 << 32, 0
    kept: list[tuple[int, str]] = []
    for line in _lines(texts):
        if (checksum := zlib.crc32(line.encode())) >= ceiling:
            continue
        kept.append((checksum, line))
        size += len(line)
        while size > most:
            ceiling //= 2
            kept = [(checksum, line) for checksum, line in kept if checksum < ceiling]
            size = sum(len(line) for _, line in kept)
    return [line for _, line in kept]


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.replace("\0", "").split("\n"):
            yield from (line[start : start + LONGEST_LINE] for start in range(0, len(line), LONGEST_LINE))


def _remedy(said: str) -> str:
    """What SentencePiece's trainer demands, in terms of our option."""
    if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", said):
        return f"the characters of the text need at least {needed[1]}"
    if (most := re.search(r"too high .* <= (\d+)", said)) and int(most[1]) >= SMALLEST_VOCABULARY:
        return f"there is text for at most {most[1]}"
    if most or "sentences_.empty()" in said:
        return "there is too little text to learn any from"
    return f"SentencePiece cannot learn as many from the text: {said.rpartition('] ')[2].strip()}"
