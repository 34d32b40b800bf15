"""Tokenizers: lossless, the same every time, and clear about what they cannot do."""

import hashlib
import io

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coe_megatron.corpus.word_problems import generate
from coe_megatron.data.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID, Tokenizer, _sample, train_tokenizer
from coe_megatron.errors import ConfigError

TEXTS = [f"{problem['query']}\n{problem['response']}" for problem in generate("train", 400, 1)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "model"
    train_tokenizer(TEXTS, 600, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(model):
    return Tokenizer(model)


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
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text
    assert UNK_ID not in tokenizer.encode(text)


def test_special_ids_are_fixed_and_vanish_when_decoded(tokenizer):
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (PAD_ID, EOS_ID, 600)
    ids = tokenizer.encode("17 apples").tolist()
    assert tokenizer.decode([BOS_ID, *ids, EOS_ID, PAD_ID, PAD_ID]) == "17 apples"


def test_digits_stand_alone_however_common_their_number_is(tmp_path):
    tokenizer = train_tokenizer([f"{text} in 2024, 2024" for text in TEXTS], 600, tmp_path / "model")
    assert len(tokenizer.encode("2024")) == 4


WORDS = (
    "apple",
    "17",
    "don't",
    "a\u2581b",
    "\u2581",
    "日本",
    "🙂",
    "x\ny",
    "\n",
    "\t",
    "",
    "\0",
    "</s>",
    "\u00a0",
    "(3*x)^2",
)


@pytest.mark.thorough
@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=30), st.sampled_from(["", " ", "  "]))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_word_by_word_gives_what_sentencepiece_gives(model, tokenizer, words, space):
    text = space + " ".join(words) + space
    assert tokenizer._words is not None
    assert tokenizer.encode(text).tolist() == plain(model, text)


def plain(model, text):
    """SentencePiece's own ids."""
    return sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(text)


def test_a_word_forgotten_is_found_again(model, monkeypatch):
    monkeypatch.setattr("coe_megatron.data.tokenizer.CACHED_WORDS", 3)
    assert Tokenizer(model).encode(TEXTS[0]).tolist() == plain(model, TEXTS[0])


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "vocab_size": 300},
        {"model_type": "bpe"},
        {"split_by_whitespace": False, "byte_fallback": True, "model_type": "bpe", "vocab_size": 700},
    ],
)
def test_a_model_that_does_not_split_at_spaces_encodes_whole_texts(tmp_path, options):
    """Unknown characters that melt together, normalised spaces, pieces that hold spaces."""
    path = foreign_model(tmp_path / "model", **options)
    for text in (*TEXTS[:20], "日本 日本  and  more ", " how many apples are there in all?"):
        assert Tokenizer(path).encode(text).tolist() == plain(path, text)


@pytest.mark.parametrize(("model_type", "size"), [("bpe", 600), ("unigram", 450)])
def test_equal_texts_train_equal_files(tmp_path, model_type, size):
    one, two = (train_tokenizer(iter(TEXTS), size, tmp_path / name, model_type=model_type) for name in "ab")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert one.sha256 == two.sha256 == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()


def test_a_long_text_is_learned_from_a_sample_of_all_its_parts(tmp_path):
    """The second half is in another alphabet, and none of its lines would be among the first characters."""
    texts = [*TEXTS, *(text.translate({ord(c): ord(c) + 0x370 for c in "abcdefgh"}) for text in TEXTS)]
    size = sum(map(len, texts)) // 3
    sampled = train_tokenizer(texts, 500, tmp_path / "model", max_characters=size)
    assert len(sampled.encode("\u03d1")) == len(sampled.encode("a")) == 1
    lines = _sample(texts, size)
    assert size / 2.5 < sum(map(len, lines)) <= size
    assert sorted(_sample(reversed(texts), size)) == sorted(lines)


def test_one_endless_line_can_be_sampled():
    assert 0 < sum(map(len, _sample(["ab " * 100_000], 100_000))) <= 100_000


def test_an_error_of_the_texts_comes_through(tmp_path):
    def broken():
        yield TEXTS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(broken(), 600, tmp_path / "model")


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        (TEXTS[:20], 30_000, r"^--vocab-size is 30000: the text allows at most \d+$"),
        (TEXTS[:20], 270, r"^--vocab-size is 270: the characters of the text require at least \d+$"),
        ([], 300, "^--vocab-size is 300: there is too little text to train any tokenizer$"),
        (["\0", "\n\n"], 300, "^--vocab-size is 300: there is too little text to train any tokenizer$"),
        (["</s>"], 300, "^--vocab-size is 300: there is too little text to train any tokenizer$"),
    ],
)
def test_a_size_that_does_not_suit_is_one_line(tmp_path, texts, size, message):
    with pytest.raises(ValueError, match=message) as caught:
        train_tokenizer(texts, size, tmp_path / "model")
    assert "\n" not in str(caught.value) and ".cc" not in str(caught.value)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("asked", [262, 30_000])
def test_the_size_that_is_said_to_suit_does(tmp_path, asked):
    """What SentencePiece says is read for it, so its words must stay as they are."""
    with pytest.raises(ConfigError) as caught:
        train_tokenizer(TEXTS[:20], asked, tmp_path / "model")
    size = int(str(caught.value).split()[-1])
    assert train_tokenizer(TEXTS[:20], size, tmp_path / "model").vocab_size == size
    with pytest.raises(ConfigError):
        train_tokenizer(TEXTS[:20], size + (1 if asked > size else -1), tmp_path / "model")


def test_an_unknown_model_type_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model_type is 'word'.*bpe, unigram"):
        train_tokenizer(TEXTS, 600, tmp_path / "model", model_type="word")


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        Tokenizer(tmp_path / "model")
    (tmp_path / "model").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"^--tokenizer is .*model: it is not a SentencePiece model$"):
        Tokenizer(tmp_path / "model", "--tokenizer")
    with pytest.raises(ConfigError, match="there is no such file"):
        Tokenizer(tmp_path / "none")
    with pytest.raises(ConfigError, match="it is a special file, where a file is needed"):
        Tokenizer("/dev/zero")


def test_a_long_text_is_encoded_in_parts_to_the_same_ids(model, tokenizer, monkeypatch):
    text = " ".join(TEXTS[:40]) + "  "
    monkeypatch.setattr("coe_megatron.data.tokenizer.SEGMENT_LENGTH", 10)
    assert Tokenizer(model).encode(text).tolist() == plain(model, text)


def test_what_has_no_spaces_is_cut_loses_nothing_and_is_not_remembered(model, tokenizer, monkeypatch):
    monkeypatch.setattr("coe_megatron.data.tokenizer.MAX_WORD_LENGTH", 1000)
    words = ["".join(text.split()) for text in TEXTS[:30]]
    text = f"{''.join(words)} {''.join(words[::-1])}"
    cut = Tokenizer(model)
    ids = cut.encode(text).tolist()
    assert cut.decode(ids) == text and ids != plain(model, text)
    assert len(ids) - len(plain(model, text)) < len(text) / 1000 * 4
    assert not cut._words


def foreign_model(path, **options):
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=writer, minloglevel=2, **{"vocab_size": 300, **options}
    )
    path.write_bytes(writer.getvalue())
    return path


def test_a_model_without_pad_lends_its_eos(tmp_path):
    tokenizer = Tokenizer(foreign_model(tmp_path / "model"))
    assert tokenizer.pad_id == tokenizer.eos_id == 2


def test_a_model_without_eos_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no end-of-sentence"):
        Tokenizer(foreign_model(tmp_path / "model", eos_id=-1))
