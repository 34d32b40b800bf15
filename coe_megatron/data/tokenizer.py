"""SentencePiece tokenizers: training one that loses nothing, and reading one from a file."""

import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

ModelType = Literal["bpe", "unigram"]

PAD_ID, UNK_ID, BOS_ID, EOS_ID = range(4)
TRAINING_CHARACTERS = 64_000_000  # more text changes a vocabulary of usual size little, but costs gigabytes


class Tokenizer:
    """A SentencePiece model with the few things that training needs of it.

    Attributes:
        vocab_size: the number of pieces; ids are 0 ... vocab_size - 1.
        eos_id: the id that ends a document.
        pad_id: the id that fills rows up; a model without a pad piece lends its eos (masks tell them apart).
        sha256: of the model file, in hexadecimal: its identity.
    """

    def __init__(self, path: str | Path) -> None:
        """Read a model file.

        Raises:
            ValueError: the file cannot be read, is no SentencePiece model, or knows no end of sentence.
        """
        from sentencepiece import SentencePieceProcessor

        try:
            model = Path(path).read_bytes()
            self._processor = SentencePieceProcessor(model_proto=model)
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no SentencePiece model"
            raise ValueError(f"tokenizer {path} cannot be read: {reason}") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise ValueError(f"tokenizer {path} has no end-of-sentence piece: train it with an eos_id")
        pad_id: int = self._processor.pad_id()
        self.pad_id = pad_id if pad_id >= 0 else self.eos_id
        self.sha256 = hashlib.sha256(model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without bos or eos."""
        return self._processor.encode(text)

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """Token ids of several texts, faster than one at a time."""
        return self._processor.encode(texts)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; control ids such as eos and pad vanish."""
        return self._processor.decode(ids)


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
        texts: documents to learn from; the first `max_characters` characters are used.
        vocab_size: pieces including the 256 bytes and the 4 special ones.
        path: where the model file goes.

    Raises:
        ValueError: an option has no valid value, or the texts are too few or too varied for `vocab_size`.
    """
    from sentencepiece import SentencePieceTrainer

    if model_type not in get_args(ModelType):
        raise ValueError(f"model_type is {model_type!r}: it must be one of {', '.join(get_args(ModelType))}")
    lines = list(_lines(texts, max_characters))  # read here: SentencePiece would disguise an error of the texts
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
        raise ValueError(f"vocab_size {vocab_size} does not suit the text: {_reason(error)}") from error
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


def _lines(texts: Iterable[str], max_characters: int) -> Iterator[str]:
    """Lines of the texts up to a number of characters. NUL would end SentencePiece's input, so it is left out."""
    for text in texts:
        if max_characters <= 0:
            return
        yield from (line for line in text[:max_characters].replace("\0", "").split("\n") if line)
        max_characters -= len(text)


def _reason(error: RuntimeError) -> str:
    """SentencePiece's own sentence without the place in its source."""
    return str(error).rpartition("] ")[2].strip() or "there is no text to learn from"
