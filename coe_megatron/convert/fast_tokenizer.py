"""A run's tokenizer as a Hugging Face fast tokenizer: `tokenizer.json` and `tokenizer_config.json`."""

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from coe_megatron.data.tokenizer import Tokenizer, parse_model
from coe_megatron.extras import require
from coe_megatron.files import problem, write_atomically

# Texts on which a converted model must agree with SentencePiece before it is written.
_PROBES = (
    "",
    " ",
    "What is 17 * 24?\n\tIt is  408.",
    "  leading and trailing  ",
    "\u00e9 \u65e5\u672c\u8a9e \U0001f642\u200d\u2581 \u00bd\ufb01\u3000\u00a0.",
    "\u0120 \u0416 nul \0 byte\r\n",
    "</s><unk><s> <0x41>",
)


def write_fast_tokenizer(model: Path, folder: Path, model_max_length: int, name: str = "the tokenizer") -> None:
    """Write a SentencePiece model, or a tokenizer.json, as a fast tokenizer that gives the same ids.

    `AutoTokenizer.from_pretrained(folder)` then returns the ids of `Tokenizer.encode` for any text, without bos or eos:
    in training nothing precedes a document's text (in packed samples the eos of the document before), and eos ends it.
    So no bos token is declared, although the model may have one. Control tokens written out in a text are text, as in
    training (`split_special_tokens`; with the library `tokenizers` alone, set `encode_special_tokens`).

    `decode` with `skip_special_tokens` equals `Tokenizer.decode` except that it drops the unknown piece and that it
    replaces a whole run of bytes that is not UTF-8, where SentencePiece replaces each byte that is not.

    The ids of a unigram model can differ in texts of many thousand characters, where two ways to split a word are
    equally likely: SentencePiece rounds the sum of a text's scores to 32 bits. Those of BPE are the same.

    Args:
        model: a model file of `train_tokenizer`, another BPE or unigram model of SentencePiece, or the tokenizer.json
            of a data folder.
        folder: an existing folder; files of these names are replaced.
        model_max_length: the longest text in tokens, of which `AutoTokenizer` warns and to which it can truncate.
        name: the option or setting that names the model, for messages.

    Raises:
        ConfigError: the file is not such a model or cannot be converted exactly, or transformers is not installed.
        OSError: writing failed.
    """
    tokenizer = Tokenizer(model, name)
    if tokenizer.config is None:
        fast, roles = _converted(model, name, tokenizer)
    elif model.suffix == ".json":
        fast, roles = _without_template(model), json.loads(tokenizer.config)
    else:
        raise problem(model, name, "a file of tiktoken does not become a fast tokenizer here")
    for text in _PROBES:
        if fast.encode(text, add_special_tokens=False).ids != tokenizer.encode(text).tolist():
            raise problem(model, name, f"a fast tokenizer would give other ids, for example for {text!r}")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "add_bos_token": False,
        "add_eos_token": False,
        **roles,
    }
    write_atomically(folder / "tokenizer.json", fast.to_str(pretty=True))
    write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def _without_template(model: Path) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer.json, which adds no special tokens and does not truncate."""
    fast = require("tokenizers").Tokenizer.from_file(str(model))
    fast.post_processor = None
    fast.no_truncation()
    fast.no_padding()
    fast.encode_special_tokens = True
    return fast


def open_fast_tokenizer(model: Path, model_max_length: int) -> Any:
    """The tokenizer that `write_fast_tokenizer` writes, as transformers opens it."""
    with TemporaryDirectory() as folder:
        write_fast_tokenizer(model, Path(folder), model_max_length)
        return require("transformers").AutoTokenizer.from_pretrained(folder)


def _converted(model: Path, name: str, tokenizer: Tokenizer) -> tuple[Any, dict[str, str]]:
    """A `tokenizers.Tokenizer` of a SentencePiece model, and its special tokens by role.

    Raises:
        ConfigError: that library has no counterpart for this kind of model.
    """
    proto = parse_model(model.read_bytes())
    converter = require("transformers.convert_slow_tokenizer").SpmConverter
    trainer = proto.trainer_spec
    if trainer.model_type not in (trainer.BPE, trainer.UNIGRAM) or proto.denormalizer_spec.precompiled_charsmap:
        raise problem(model, name, "only BPE and unigram models without denormalization become fast tokenizers")
    is_bpe = trainer.model_type == trainer.BPE
    vocabulary: Any = {piece.piece: id_ for id_, piece in enumerate(proto.pieces)} if is_bpe else _scores(proto)
    fast = converter.build_tokenizer_from_spm_proto(proto, vocabulary)
    if not is_bpe:
        _cut_at_unknown(fast, proto)
    special = [piece.piece for piece in proto.pieces if piece.type in (piece.UNKNOWN, piece.CONTROL)]
    fast.add_special_tokens([require("tokenizers").AddedToken(piece, normalized=False) for piece in special])
    fast.encode_special_tokens = True
    pieces = {"unk_token": trainer.unk_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    return fast, {role: proto.pieces[id_].piece for role, id_ in pieces.items()}


def _scores(proto: Any) -> list[tuple[str, float]]:
    """Pieces and scores of a unigram model, for a library that also finds control and byte pieces in the text: their
    scores are so low that the characters are always better.
    """
    least = min(piece.score for piece in proto.pieces) - 10  # an unknown character, as both libraries rate it
    longest = max(len(piece.piece) for piece in proto.pieces if not _is_text(piece))
    return [(piece.piece, piece.score if _is_text(piece) else longest * least - 1) for piece in proto.pieces]


def _cut_at_unknown(fast: Any, proto: Any) -> None:
    """Cut a text at characters of control and byte pieces that no piece of text has: else those would be found after
    all, as better than an unknown character. Without byte fallback it would part unknown characters that are one piece.
    """
    known = {character for piece in proto.pieces if _is_text(piece) for character in piece.piece}
    unknown = {character for piece in proto.pieces if not _is_text(piece) for character in piece.piece} - known
    if unknown and proto.trainer_spec.byte_fallback:
        library = require("tokenizers")
        pattern = library.Regex("|".join(map(re.escape, sorted(unknown))))
        cut = library.pre_tokenizers.Split(pattern, "isolated")
        before = [fast.pre_tokenizer] if fast.pre_tokenizer else []
        fast.pre_tokenizer = library.pre_tokenizers.Sequence([*before, cut])


def _is_text(piece: Any) -> bool:
    return piece.type in (piece.NORMAL, piece.USER_DEFINED)
