"""Fast tokenizers: the ids and the text of the SentencePiece model that they were made of."""

import base64
import io
import json
import lzma

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, processors

from coe_megatron.convert.fast_tokenizer import write_fast_tokenizer
from coe_megatron.corpus.word_problems import generate
from coe_megatron.data.tokenizer import Tokenizer, train_tokenizer
from coe_megatron.errors import ConfigError

TEXTS = [f"{problem['query']}\n{problem['response']}" for problem in generate("train", 300, 1)]
WORDS = (
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\0",
    "\u2581",
    "2024",
    "don't",
    "\U0001f642\u200d\u2642",
    "\u65e5\u672c",
    "</s>",
    "<0x41>",
)
TEXT = st.lists(st.sampled_from(WORDS) | st.sampled_from(TEXTS) | st.text(max_size=8), max_size=20).map("".join)
QUICK = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])


def fast_tokenizer(model, folder):
    from transformers import AutoTokenizer

    folder.mkdir()
    write_fast_tokenizer(model, folder, 128)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=[("bpe", 700), ("unigram", 500)], ids=lambda param: param[0])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    model_type, size = request.param
    ours = train_tokenizer([*TEXTS, "\u65e5\u672c\u8a9e " * 20], size, folder / "model", model_type=model_type)
    return ours, fast_tokenizer(folder / "model", folder / "fast")


@pytest.mark.thorough
@given(TEXT)
@QUICK
def test_any_text_has_the_same_ids_and_comes_back(pair, text):
    ours, fast = pair
    ids = ours.encode(text).tolist()
    assert fast(text)["input_ids"] == fast.encode(text) == ids
    assert fast.decode(ids) == ours.decode(ids) == text.replace("\u2581", " ")


@pytest.mark.thorough
@given(st.lists(st.integers(4, 499), max_size=20))
@QUICK
def test_any_ids_that_are_text_decode_alike(pair, ids):
    ours, fast = pair
    if "\ufffd" not in (text := ours.decode(ids)):
        assert fast.decode(ids) == text


@pytest.mark.parametrize("text", ["", " ", *WORDS, *TEXTS[:20]])
def test_texts_have_the_same_ids(pair, text):
    ours, fast = pair
    assert fast(text)["input_ids"] == ours.encode(text).tolist()


def test_roles_of_special_tokens(pair):
    """A prompt gets no bos and no eos, as a document in training before its eos."""
    ours, fast = pair
    assert (fast.pad_token_id, fast.unk_token_id, fast.eos_token_id) == (0, 1, 3)
    assert fast.bos_token is None and fast.convert_ids_to_tokens(2) == "<s>"
    assert (len(fast), fast.model_max_length, fast.is_fast) == (ours.vocab_size, 128, True)
    ids = ours.encode("17 apples").tolist()
    assert fast.decode([2, *ids, 3, 0], skip_special_tokens=True) == "17 apples"
    assert fast.decode([*ids, 3]) == "17 apples</s>"


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["gsm8k_valid.jsonl", "math_valid.jsonl.xz", "wiki_valid.jsonl.xz"])
def test_real_text_has_the_same_ids(pair, real_text, name):
    ours, fast = pair
    with (lzma.open if name.endswith(".xz") else open)(real_text / name, "rt") as file:
        documents = ["\n".join(map(str, json.loads(line).values())) for line in file]
    encoded = fast(documents)["input_ids"]
    differing = [text for text, ids in zip(documents, encoded, strict=True) if ids != ours.encode(text).tolist()]
    # A unigram model rounds the sum of a whole article's scores, so that ties fall either way (see the docstring).
    is_unigram = type(fast.backend_tokenizer.model).__name__ == "Unigram"
    assert len(differing) <= (is_unigram and name.startswith("wiki"))
    for ids in encoded:
        assert fast.decode(ids) == ours.decode(ids)


def foreign(folder, **options):
    """A model of others: by default with a dummy prefix, normalization and extra spaces removed."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, **{"minloglevel": 2, "vocab_size": 500, **options}
    )
    path = folder / "foreign.model"
    path.write_bytes(model.getvalue())
    return path


LLAMA_2 = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "split_digits": True,
    "remove_extra_whitespaces": False,
}
FOREIGN = {
    "Llama 2": LLAMA_2,
    "unigram with bytes": {"model_type": "unigram", "byte_fallback": True},
    "nmt_nfkc with bytes": {"model_type": "bpe", "byte_fallback": True},
    "user-defined": {**LLAMA_2, "user_defined_symbols": ["<sep>", "apples"]},
}


@pytest.mark.thorough
@pytest.mark.parametrize("options", FOREIGN.values(), ids=FOREIGN)
def test_models_of_others(tmp_path, options):
    path = foreign(tmp_path, **options)
    fast, processor = fast_tokenizer(path, tmp_path / "fast"), SentencePieceProcessor(model_file=str(path))

    @given(TEXT)
    @QUICK
    def same(text):
        assert fast(text)["input_ids"] == processor.encode(text)

    same()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "char", "vocab_size": 50}, "only BPE and unigram models"),
        ({"model_type": "word", "vocab_size": 50}, "only BPE and unigram models"),
        ({"model_type": "unigram"}, "a fast tokenizer would give other ids, for example for '</s>"),
    ],
)
def test_a_model_without_a_counterpart_is_refused(tmp_path, options, reason):
    path = foreign(tmp_path, **options)
    with pytest.raises(ConfigError, match=rf"the tokenizer is .*foreign\.model: {reason}"):
        write_fast_tokenizer(path, tmp_path, 128)
    assert [file.name for file in tmp_path.iterdir()] == ["foreign.model"]


def test_a_tokenizer_json_loses_its_template_and_truncation(tmp_path):
    library = Library(models.WordLevel({"<s>": 0, "</s>": 1, "one": 2, "two": 3, "?": 4}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["<s>", "</s>"])
    library.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    library.enable_truncation(2)
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "<s>"}')
    fast = fast_tokenizer(tmp_path / "tokenizer.json", tmp_path / "fast")
    text = "one two one two two"
    assert fast(text)["input_ids"] == Tokenizer(tmp_path / "tokenizer.json").encode(text).tolist() == [2, 3, 2, 3, 3]
    assert (fast.eos_token_id, fast.bos_token, fast.model_max_length) == (1, None, 128)


def test_a_file_of_tiktoken_is_refused(tmp_path):
    ranks = "".join(f"{base64.b64encode(bytes([value])).decode()} {value}\n" for value in range(256))
    (path := tmp_path / "cl100k_base.tiktoken").write_text(ranks)
    with pytest.raises(ConfigError, match=r"cl100k_base.tiktoken: a file of tiktoken does not become a fast tokenizer"):
        write_fast_tokenizer(path, tmp_path, 128)
