"""Tokenizers of Hugging Face and tiktoken: prepared with them, data has their ids, and is used like any other."""

import base64
import json
import pickle
from dataclasses import replace

import pytest
import tiktoken
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from coe_megatron.config import parse
from coe_megatron.corpus.word_problems import generate
from coe_megatron.data import prepare as prepare_module
from coe_megatron.data.datasets import PreparedData
from coe_megatron.data.folders import check_data
from coe_megatron.data.manifest import MANIFEST, SPLIT_FILES, TOKENIZER_CONFIG, Manifest
from coe_megatron.data.prepare import prepare
from coe_megatron.data.prepare_settings import PrepareSettings
from coe_megatron.data.records import InputError
from coe_megatron.data.run_data import RunData
from coe_megatron.data.tokenizer import Tokenizer, train_tokenizer
from coe_megatron.errors import ConfigError

TEXTS = [f"{record['query']}\n{record['response']}" for record in generate("train", 60, 2)]
END = "<|endoftext|>"


def write_huggingface(folder):
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(TEXTS, trainer)
    library.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    library.enable_truncation(5)
    library.save(str(folder / "tokenizer.json"))
    config = {"eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<pad>", "chat_template": "{{ x }}"}
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config))
    return folder / "tokenizer.json"


def write_tiktoken(folder):
    tokens = [*(bytes([value]) for value in range(256)), b"he", b"the", b" the", b" a", b"an", b"\n\n", b"12", b"123"]
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
    (folder / "cl100k_base.tiktoken").write_bytes(b"".join(lines))
    return folder / "cl100k_base.tiktoken"


WRITERS = {"tokenizer.json": write_huggingface, "tokenizer.tiktoken": write_tiktoken}


@pytest.fixture(params=WRITERS)
def given_file(request, tmp_path):
    (folder := tmp_path / "given").mkdir()
    return WRITERS[request.param](folder)


@pytest.fixture
def asked(tmp_path, given_file):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:9]))
    inputs = {"inputs": (tmp_path / "in.jsonl",), "valid_inputs": (tmp_path / "valid.jsonl",)}
    return PrepareSettings(tmp_path / "out", **inputs, tokenizer=given_file)


def library_ids(file):
    """The library's own function from a text to ids without special tokens, and the id that ends a document."""
    if file.suffix == ".json":
        library = tokenizers.Tokenizer.from_file(str(file))
        library.no_truncation()
        return lambda text: library.encode(text, add_special_tokens=False).ids, library.token_to_id("</s>")
    # The pattern of cl100k_base up to contractions, which these texts do not have.
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    lines = (line.split() for line in file.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    library = tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: 100257})
    return library.encode_ordinary, 100257


def test_prepared_data_has_the_librarys_ids(asked, given_file):
    manifest = prepare(asked)
    data, (ids_of, end) = IndexedDataset(str(asked.output / "train")), library_ids(given_file)
    assert [data[index].tolist() for index in range(len(data))] == [[*ids_of(text), end] for text in TEXTS]
    name = f"tokenizer{given_file.suffix}"
    files = {*SPLIT_FILES, name, TOKENIZER_CONFIG}
    assert {path.name for path in asked.output.iterdir()} == files | {MANIFEST} and manifest.files.keys() == files
    assert (asked.output / name).read_bytes() == given_file.read_bytes()
    assert Manifest.read(asked.output) == manifest
    manifest.verify(asked.output)


def test_prepared_data_is_opened_and_decoded(asked):
    prepare(asked)
    data = PreparedData.open(asked.output)
    tokenizer = pickle.loads(pickle.dumps(data.tokenizer))  # as rank 0 sends it to the others
    assert tokenizer.encode("</s> <|endoftext|>").tolist() == data.tokenizer.encode("</s> <|endoftext|>").tolist()
    first = [int(token) for token in data.rows("train", 600)[0]["tokens"]]
    assert tokenizer.decode(first) == TEXTS[0] and first[-1] == tokenizer.pad_id
    assert tokenizer.vocab_size == data.manifest.vocab_size > max(first)
    assert all(0 <= id_ < tokenizer.vocab_size for id_ in (tokenizer.eos_id, tokenizer.pad_id))


def test_workers_and_an_interruption_change_nothing(asked, tmp_path, monkeypatch):
    prepare(asked)
    with monkeypatch.context() as patched:
        patched.setattr(prepare_module, "join", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
        with pytest.raises(OSError, match="the disk is full"):
            prepare(replace(asked, output=tmp_path / "two", workers=2))
        assert not (tmp_path / "two").exists() and prepare_module.resumable_progress(tmp_path / "two")
    prepare(replace(asked, output=tmp_path / "two"))
    for path in asked.output.iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_the_tokenizer_of_prepared_data_serves_again(asked, tmp_path):
    """Named as the file or as the folder; the end of a document comes with it. Another end is another tokenizer."""
    file = asked.output / Manifest.read(asked.output).tokenizer if prepare(asked) else None
    for name, tokenizer in (("two", file), ("three", asked.output)):
        prepare(replace(asked, output=tmp_path / name, tokenizer=tokenizer))
    parts = [{"path": str(tmp_path / name), "weight": 1} for name in ("out", "two", "three")]
    config = parse({"data": {"blend": parts}, "model": {"seq_length": 16}})
    assert check_data(config, needed=True) and RunData.open(config.data).tokenizer_size
    other = "<s>" if file.suffix == ".json" else "<|endofprompt|>"
    prepare(replace(asked, output=tmp_path / "two", tokenizer=file, eos=other, overwrite=True))
    with pytest.raises(ConfigError, match=rf"data.blend.1.path is .*two: its tokenizer differs .* {file}"):
        check_data(config, needed=True)


@pytest.mark.thorough
@given(st.text() | st.lists(st.sampled_from([*TEXTS, "</s>", END, "\u2581", " ", "\n"])).map("".join))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_comes_back_without_special_ids(given_file, text):
    tokenizer = Tokenizer(given_file)
    ids = tokenizer.encode(text).tolist()
    assert tokenizer.decode([*ids, tokenizer.eos_id, tokenizer.pad_id]) == text and tokenizer.eos_id not in ids


def test_a_changed_tokenizer_is_refused(asked):
    manifest = prepare(asked)
    config = asked.output / TOKENIZER_CONFIG
    config.write_text(config.read_text().replace("false", "true "))
    with pytest.raises(ConfigError, match=r"tokenizer_config.json is not the tokenizer this data was prepared with"):
        Manifest.read(asked.output)
    config.unlink()
    with pytest.raises(ConfigError, match=r"incomplete: tokenizer_config.json is missing"):
        Manifest.read(asked.output)
    assert manifest.tokenizer == f"tokenizer{asked.tokenizer.suffix}"


def refusal(path, **options):
    with pytest.raises(ConfigError) as caught:
        Tokenizer(path, "--tokenizer", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"--tokenizer is {path}: ")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": {"type": "BPE", "vocab": {}, "merges": ["a"]}}'])
def test_a_file_that_is_no_tokenizer_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    assert refusal(tmp_path / "tokenizer.json").startswith("it is not a file of tokenizers (")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: b"", "a byte has no token"),
        (lambda content: content[content.index(b"\n") + 1 :], "a byte has no token"),
        (lambda content: content + b"YQ== x\n", "line 265 is not a token in base64 and its id"),
        (lambda content: content + b"YQ==\n", "line 265 is not a token in base64 and its id"),
        (lambda content: content + b"YWI= 5\n", "a token or an id occurs twice, or an id is negative"),
        (lambda content: content + b"YWI= -5\n", "a token or an id occurs twice, or an id is negative"),
        (lambda content: content + b"YWI= 99999999\n", "its ids end at 100000000"),
        (lambda content: content + b"YWI= 999999999999\n", "it is not a file of tiktoken ("),
    ],
)
def test_a_file_that_is_no_tiktoken_file(tmp_path, change, reason):
    path = write_tiktoken(tmp_path)
    path.write_bytes(change(path.read_bytes()))
    assert reason in refusal(path)


def test_a_pattern_is_known_or_the_known_are_listed(tmp_path):
    path = write_tiktoken(tmp_path).rename(tmp_path / "qwen.tiktoken")
    known = "r50k_base, p50k_base, p50k_edit, cl100k_base, o200k_base"
    assert f"'qwen' is no encoding whose pattern we know ({known})" in refusal(path)
    assert "use --encoding" in refusal(path, encoding="gpt2")
    assert Tokenizer(path, encoding="cl100k_base").vocab_size == 100277


def test_an_end_of_documents_is_a_token(tmp_path):
    path = write_huggingface(tmp_path)
    assert refusal(path, eos="<end>") == "it has no token '<end>' to end a document: use --eos TOKEN"
    assert Tokenizer(path, eos="<s>").eos_id == 1
    (tmp_path / TOKENIZER_CONFIG).unlink()
    assert refusal(path) == "no tokenizer_config.json beside it names its end-of-text token: use --eos TOKEN"
    tokenizer = Tokenizer(path, eos="</s>")
    assert tokenizer.eos_id == tokenizer.pad_id == 2
    for content, reason in (("{", "it is not JSON ("), ("[]", "it is not a JSON object")):
        (tmp_path / TOKENIZER_CONFIG).write_text(content)
        assert refusal(path).startswith(f"--tokenizer is {tmp_path / TOKENIZER_CONFIG}: {reason}")


@pytest.mark.parametrize("library", ["tokenizers", "tiktoken"])
def test_what_to_install_is_said(tmp_path, monkeypatch, library):
    path = write_huggingface(tmp_path) if library == "tokenizers" else write_tiktoken(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(ConfigError, match=rf"^{library} is not installed: pip install 'coe-megatron\[hf\]'"):
        Tokenizer(path)


def test_options_of_other_tokenizers_need_one(tmp_path):
    train_tokenizer(TEXTS, 400, tmp_path / "tokenizer.model")
    asked = PrepareSettings(tmp_path / "out", builtin=60, tokenizer=tmp_path / "tokenizer.model")
    with pytest.raises(ConfigError, match=r"--eos is </s>: only a --tokenizer that is no SentencePiece model needs it"):
        prepare(replace(asked, eos="</s>"))
    with pytest.raises(ConfigError, match=r"--encoding is gpt2: only a --tokenizer that is a .tiktoken file has one"):
        prepare(replace(asked, encoding="gpt2"))
    assert not (tmp_path / "out").exists()


def test_a_text_on_which_tiktoken_fails_is_one_line(tmp_path):
    path = write_tiktoken(tmp_path)
    with pytest.raises(InputError, match=r"^a text cannot be encoded \(.*StackOverflow.*\): '   "):
        Tokenizer(path, encoding="o200k_base").encode(" " * 3_000_000)
