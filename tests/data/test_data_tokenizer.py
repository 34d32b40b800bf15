"""Tokenizers: lossless, the same every time, and clear about what they cannot do."""

import hashlib
import io

import pytest
import sentencepiece

from coe_megatron.data.corpus import generate
from coe_megatron.data.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID, Tokenizer, train_tokenizer

TEXTS = [f"{problem['query']}\n{problem['response']}" for problem in generate("train", 400, 1)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS, 600, tmp_path_factory.mktemp("tokenizer") / "model")


@pytest.mark.parametrize(
    "text",
    [
        *TEXTS[:3],
        "two  spaces\n\nand lines\r\n\ttab ",
        "  leading",
        "日本語 🙂 é \u00a0",
        "</s><pad><unk> <0x41>",
        "nul \0 byte",
        "",
    ],
)
def test_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert UNK_ID not in tokenizer.encode(text)


def test_special_ids_are_fixed_and_vanish_when_decoded(tokenizer):
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (PAD_ID, EOS_ID, 600)
    ids = tokenizer.encode("17 apples")
    assert tokenizer.decode([BOS_ID, *ids, EOS_ID, PAD_ID, PAD_ID]) == "17 apples"


def test_digits_stand_alone_however_common_their_number_is(tmp_path):
    tokenizer = train_tokenizer([f"{text} in 2024, 2024" for text in TEXTS], 600, tmp_path / "model")
    assert len(tokenizer.encode("2024")) == 4


def test_many_at_once_equals_one_at_a_time(tokenizer):
    assert tokenizer.encode_many(TEXTS[:5]) == [tokenizer.encode(text) for text in TEXTS[:5]]


@pytest.mark.parametrize(("model_type", "size"), [("bpe", 600), ("unigram", 450)])
def test_equal_texts_train_equal_files(tmp_path, model_type, size):
    one, two = (train_tokenizer(iter(TEXTS), size, tmp_path / name, model_type=model_type) for name in "ab")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert one.sha256 == two.sha256 == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()


def test_training_uses_no_more_text_than_asked(tmp_path):
    def endless():
        while True:
            yield from TEXTS

    train_tokenizer(endless(), 500, tmp_path / "model", max_characters=60_000)


def test_an_error_of_the_texts_comes_through(tmp_path):
    def broken():
        yield TEXTS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(broken(), 600, tmp_path / "model")


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        (TEXTS[:20], 30_000, "vocab_size 30000 .*too high"),
        (TEXTS[:20], 270, "vocab_size 270 .*smaller"),
        ([], 300, "vocab_size 300 "),
    ],
)
def test_a_size_that_does_not_suit_is_one_line(tmp_path, texts, size, message):
    with pytest.raises(ValueError, match=message) as caught:
        train_tokenizer(texts, size, tmp_path / "model")
    assert "\n" not in str(caught.value) and ".cc" not in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_an_unknown_model_type_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model_type is 'word'.*bpe, unigram"):
        train_tokenizer(TEXTS, 600, tmp_path / "model", model_type="word")


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="is no SentencePiece model"):
        Tokenizer(tmp_path / "model")
    with pytest.raises(ValueError, match="No such file"):
        Tokenizer(tmp_path / "none")


def foreign_model(path, **ids):
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=writer, vocab_size=300, minloglevel=2, **ids
    )
    path.write_bytes(writer.getvalue())
    return path


def test_a_model_without_pad_lends_its_eos(tmp_path):
    tokenizer = Tokenizer(foreign_model(tmp_path / "model"))
    assert tokenizer.pad_id == tokenizer.eos_id == 2


def test_a_model_without_eos_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no end-of-sentence"):
        Tokenizer(foreign_model(tmp_path / "model", eos_id=-1))
