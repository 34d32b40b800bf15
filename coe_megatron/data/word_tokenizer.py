"""A tokenizer whose tokens are the words of a small, known vocabulary."""

from collections.abc import Sequence
from pathlib import Path

from coe_megatron.extras import require

UNKNOWN, END = "<unk>", "<eos>"


def write_word_tokenizer(words: Sequence[str], folder: Path) -> Path:
    """Write a `tokenizer.json` that splits text at white space; equal words give equal bytes.

    Ids: 0 for unknown words, 1 for the end of a document, then the words in order.

    Returns:
        The path of the file.

    Raises:
        ConfigError: tokenizers is not installed.
        OSError: writing failed.
    """
    library = require("tokenizers")
    vocabulary = {word: number for number, word in enumerate([UNKNOWN, END, *words])}
    tokenizer = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    path = folder / "tokenizer.json"
    path.write_text(tokenizer.to_str(pretty=True))
    return path
