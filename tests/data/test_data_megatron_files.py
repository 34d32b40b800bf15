"""Indexed datasets that Megatron's builder wrote, taken as they are: their documents, and what is refused."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from coe_megatron.config import parse
from coe_megatron.config.settings import BlendPart, DataSettings
from coe_megatron.data import megatron_files
from coe_megatron.data.folders import check_data, check_folders, missing_folders
from coe_megatron.data.indexed_prefix import IndexedPrefix
from coe_megatron.data.prepare import prepare
from coe_megatron.data.prepare_settings import PrepareSettings
from coe_megatron.data.run_data import RunData
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.run_estimate import vocabulary
from coe_megatron.study.plan.amounts import Amounts

END, VOCABULARY = 7, 600


def write(prefix, documents, dtype=np.int32):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.array(document, dtype), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def documents_of(seed, count=40):
    random = np.random.default_rng(seed)
    return [[*random.integers(10, VOCABULARY, random.integers(1, 30)).tolist(), END] for _ in range(count)]


@pytest.fixture
def prefix(tmp_path):
    return write(tmp_path / "text_document", documents_of(0))


@pytest.fixture
def other(tmp_path):
    return write(tmp_path / "other", documents_of(1), np.uint16)


def named(prefix, other, **more):
    return DataSettings(path=str(prefix), validation={"far": str(other)}, **more)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.int16])
def test_rows_are_the_documents(tmp_path, other, dtype):
    data = RunData.open(named(write(tmp_path / "in", documents_of(0), dtype), other), VOCABULARY)
    (rows,) = data.training_samples(16, seed=0, cache_dir=tmp_path)
    assert len(rows) == 40
    for index, document in enumerate(documents_of(0)):
        row = rows[index]
        kept = document[:17]
        assert row["tokens"].tolist()[: len(kept)] == kept[:16] and int(row["loss_mask"].sum()) == len(kept) - 1
        assert row["labels"][row["loss_mask"] > 0].tolist() == kept[1:]
    assert data.truncated_fraction(16) == np.mean([len(document) > 17 for document in documents_of(0)])
    assert (data.tokenizer_size, data.tokenizer_sha256) == (VOCABULARY, "")


def test_packed_samples_hold_every_token_once(tmp_path, prefix, other):
    settings = named(prefix, other, samples="packed", reset_at_documents=True)
    data = RunData.open(settings, VOCABULARY)
    (packed,) = data.training_samples(16, seed=0, cache_dir=tmp_path / "cache")
    labels = torch.cat([packed[index]["labels"] for index in range(len(packed))])
    expected = [token for document in documents_of(0) for token in document]
    assert len(labels) == (len(expected) - 1) // 16 * 16
    assert (np.bincount(labels, minlength=VOCABULARY) <= np.bincount(expected, minlength=VOCABULARY)).all()
    sample = next(packed[index] for index in range(len(packed)) if END in packed[index]["tokens"][:-1])
    place = sample["tokens"].tolist().index(END)
    assert sample["position_ids"][: place + 2].tolist() == [*range(place + 1), 0]
    far = data.validation_samples(16, seed=0, cache_dir=tmp_path / "cache")["far"]
    assert len(far) == -(-(sum(map(len, documents_of(1))) - 1) // 16)


def test_a_large_file_is_looked_into_in_part(prefix, other, monkeypatch):
    whole = RunData.open(named(prefix, other), VOCABULARY).text_identity
    monkeypatch.setattr(megatron_files, "_PIECE_BYTES", 64)
    monkeypatch.setattr(megatron_files, "MAX_HASHED_BYTES", 640)
    part = RunData.open(named(prefix, other), VOCABULARY)
    assert part.text_identity != whole
    pieces = list(megatron_files._pieces(IndexedPrefix.read(prefix, "x").token_ids()))
    assert len(pieces) == 10 and pieces[-1][-1] == END


def test_a_blend_with_a_prepared_folder_has_its_vocabulary(tmp_path, prefix):
    prepared = prepare(PrepareSettings(tmp_path / "prepared", builtin=60, vocab_size=512))
    blend = [BlendPart(str(prefix), 1.0), BlendPart(str(tmp_path / "prepared"), 3.0)]
    settings = DataSettings(blend=blend, validation={"near": str(tmp_path / "prepared")})
    with pytest.raises(
        ConfigError, match=r"data.blend.0.path is .*text_document.bin: it contains token 59., but the tok"
    ):
        RunData.open(settings, VOCABULARY)
    write(prefix, [[token % 512 for token in document] for document in documents_of(0)])
    data = RunData.open(settings)
    assert (data.tokenizer_size, data.tokenizer_sha256) == (512, prepared.tokenizer_sha256)
    assert [weight for _, weight in data.text_identity] == [1.0, 3.0]
    assert [corpus.summary("train").bytes_per_token is None for corpus in data.corpora] == [True, False]


def config_of(prefix, other, **model):
    return parse(
        {"data": {"path": str(prefix), "validation": {"far": str(other)}}, "model": {"seq_length": 16, **model}}
    )


def test_planning_reads_the_index_alone(prefix, other):
    config = config_of(prefix, other, vocab_size=640)
    assert vocabulary(config, data_needed=True) == 640 and missing_folders(config.data) == []
    assert Amounts().validation_samples(config) == 40
    with pytest.raises(
        ConfigError, match=r"^model.vocab_size is null: data.path is .*, files of Megatron without a tok"
    ):
        vocabulary(config_of(prefix, other))
    with pytest.raises(ConfigError, match=r"^model.vocab_size is null: data.path is "):
        RunData.open(named(prefix, other))


def test_validation_is_named(prefix, other):
    for settings in (DataSettings(path=str(prefix)), DataSettings(blend=[BlendPart(str(prefix), 1.0)])):
        with pytest.raises(
            ConfigError, match=r"^data.validation is null: data\..*text_document, files of Megatron wit"
        ):
            check_folders(settings, needed=False)
    assert check_folders(named(prefix, other), needed=True) is None


@pytest.mark.parametrize("change", [99, -1])
def test_an_id_beyond_the_vocabulary_is_named(tmp_path, other, change):
    prefix = write(tmp_path / "in", [[1, 2, change, END]])
    said = rf"^data.path is .*in.bin: it contains token {change}, but model.vocab_size is 64$"
    with pytest.raises(ConfigError, match=said):
        RunData.open(named(prefix, other), 64)


def test_documents_without_one_end_cannot_be_reset(tmp_path, other):
    prefix = write(tmp_path / "in", [[1, 2, 3, 4], [5, 6], [], [7]] * 9)
    assert IndexedPrefix.read(prefix, "x").end_of_documents() is None
    data = RunData.open(named(prefix, other, samples="packed", reset_at_documents=True), VOCABULARY)
    with pytest.raises(
        ConfigError, match=r"data.reset_at_documents is true: the documents of .*in do not all end in one"
    ):
        data.training_samples(4, seed=0, cache_dir=tmp_path)
    plain = RunData.open(named(prefix, other, samples="packed"), VOCABULARY)
    assert len(plain.training_samples(4, seed=0, cache_dir=tmp_path)[0]) == (7 * 9 - 1) // 4


def test_a_text_too_short_for_a_packed_sample_is_named(tmp_path, other):
    short = write(tmp_path / "in", [[1, 2, END]])
    config = parse(
        {
            "data": {"path": str(short), "validation": {"far": str(other)}, "samples": "packed"},
            "model": {"seq_length": 16},
        }
    )
    with pytest.raises(
        ConfigError, match=r"model.seq_length is 16: packed samples need more tokens than .*in has \(3\)"
    ):
        check_data(config, needed=True)


def several_sequences(prefix):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    builder.add_document(np.arange(6, dtype=np.int32), [4, 2])
    builder.finalize(f"{prefix}.idx")


def changed_index(offset, form, value):
    def change(prefix):
        content = bytearray(Path(f"{prefix}.idx").read_bytes())
        struct.pack_into(form, content, offset, value)
        Path(f"{prefix}.idx").write_bytes(content)

    return change


DAMAGE = {
    "no tokens file": (lambda prefix: Path(f"{prefix}.bin").unlink(), "document.bin: there is no such file"),
    "tokens cut": (
        lambda prefix: Path(f"{prefix}.bin").write_bytes(b"ab"),
        "document.bin: it has 2 bytes, but its index",
    ),
    "index empty": (lambda prefix: Path(f"{prefix}.idx").write_bytes(b""), r"\(it does not begin as one\)"),
    "index cut": (
        lambda prefix: Path(f"{prefix}.idx").write_bytes(Path(f"{prefix}.idx").read_bytes()[:-1]),
        "it has 841 b",
    ),
    "another version": (changed_index(9, "<Q", 2), r"\(version 2, type 4\)"),
    "floats": (changed_index(17, "<B", 7), r"\(version 1, type 7\)"),
    "count": (changed_index(18, "<Q", 1 << 60), "its documents have several sequences"),
    "negative": (changed_index(34, "<i", -5), "a document has a negative length"),
    "start": (changed_index(34 + 4 * 40, "<q", 8), "its documents are not one after the other"),
    "several sequences": (several_sequences, "its documents have several sequences: write each document as one"),
    "nothing": (lambda prefix: write(prefix, [[]]), "it has no tokens"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_one_line(prefix, other, damage, reason):
    damage(prefix)
    with pytest.raises(ConfigError, match=rf"^data.path is .*{reason}") as caught:
        check_folders(named(prefix, other), needed=True)
    assert "\n" not in str(caught.value)


def test_what_is_neither_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"data.path: .*nowhere is not prepared data"):
        check_folders(DataSettings(path=str(tmp_path / "nowhere")), needed=True)


def test_the_index_is_megatrons_own_reading(prefix):
    ours, theirs = IndexedPrefix.read(prefix, "x"), IndexedDataset(str(prefix))
    assert (ours.documents, ours.tokens) == (len(theirs), int(theirs.sequence_lengths.sum()))
    assert ours.token_ids().tolist() == [int(token) for index in range(len(theirs)) for token in theirs[index]]
