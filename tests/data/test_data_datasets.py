"""Samples and batches: shapes, the shift of labels, and an order that knows neither ranks nor interruptions."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from coe_megatron.data.datasets import PreparedData, StepBatches, validation_batches
from coe_megatron.data.manifest import MANIFEST
from coe_megatron.data.prepare import prepare
from coe_megatron.data.prepare_settings import PrepareSettings
from coe_megatron.errors import ConfigError

S = 48
KEYS = {
    "tokens": torch.int64,
    "labels": torch.int64,
    "loss_mask": torch.float32,
    "position_ids": torch.int64,
    "padding_mask": torch.bool,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents of many lengths, from a few tokens to far more than S."""
    parent = tmp_path_factory.mktemp("prepared")
    texts = [" ".join(f"{word % 7 + 2} apples and" for word in range(1 + i * i % 37)) for i in range(61)]
    (parent / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (parent / "valid.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:17]))
    inputs = {"inputs": (parent / "in.jsonl",), "valid_inputs": (parent / "valid.jsonl",)}
    prepare(PrepareSettings(output=parent / "data", vocab_size=285, **inputs))
    return parent / "data"


@pytest.fixture(scope="module")
def data(folder):
    return PreparedData.open(folder)


@pytest.fixture
def broken(folder, tmp_path):
    """A copy to break."""
    copy = tmp_path / "data"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


class Numbers:
    """A dataset of n samples whose tokens tell their index."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        filled = torch.full((2,), index)
        ones = torch.ones(2)
        return {"tokens": filled, "loss_mask": ones, "padding_mask": ones == 0}


def check_sample(sample):
    assert {name: value.dtype for name, value in sample.items()} == KEYS
    assert all(value.shape == (S,) for value in sample.values())
    assert sample["position_ids"].tolist() == list(range(S))


def test_rows_are_documents_cut_or_padded(data, folder):
    rows, documents = data.rows("train", S), IndexedDataset(str(folder / "train"))
    assert len(rows) == len(documents) == 61
    assert {len(documents[i]) > S + 1 for i in range(61)} == {True, False}
    for i in range(61):
        sample, document = rows[i], documents[i].tolist()
        check_sample(sample)
        padded = (document + [data.tokenizer.pad_id] * S)[: S + 1]
        labels = min(len(document) - 1, S)
        assert sample["tokens"].tolist() == padded[:-1] and sample["labels"].tolist() == padded[1:]
        assert sample["loss_mask"].tolist() == [1.0] * labels + [0.0] * (S - labels)
        assert sample["padding_mask"].tolist() == [place >= len(document) for place in range(S)]


def test_the_end_of_a_short_document_is_learned(data):
    sample = data.rows("train", S)[0]
    learned = sample["labels"][sample["loss_mask"] == 1]
    assert learned[-1] == data.tokenizer.eos_id and sample["padding_mask"].any()


@pytest.mark.parametrize("answer_tokens", [1, 3])
def test_the_loss_counts_only_the_last_tokens_before_the_end(data, folder, answer_tokens):
    rows, documents = data.rows("train", S, answer_tokens), IndexedDataset(str(folder / "train"))
    cut = 0
    for row, document in zip((rows[index] for index in range(len(rows))), documents, strict=True):
        counted = set(range(len(document) - 1 - answer_tokens, len(document) - 1))  # as places in the document
        cut += not all(place <= S for place in counted)
        places = torch.nonzero(row["loss_mask"]).flatten().tolist()
        assert places == sorted(place - 1 for place in counted if 1 <= place <= S)
        assert row["labels"][places].tolist() == [document[place + 1] for place in places]
    assert 0 < cut < len(rows)


def stream_of(samples):
    """Tokens of consecutive windows, put in order by what follows what."""
    return Counter(int(label) for s in samples for label in s["labels"][s["loss_mask"] == 1])


def test_packed_windows_hold_nearly_all_tokens_once(data, folder, tmp_path):
    packed = data.packed("train", S, seed=3, cache_dir=tmp_path)
    tokens = data.manifest.splits["train"].tokens
    assert len(packed) == (tokens - 1) // S
    samples = [packed[i] for i in range(len(packed))]
    for sample in samples:
        check_sample(sample)
        assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
        assert sample["loss_mask"].all() and not sample["padding_mask"].any()
    documents = IndexedDataset(str(folder / "train"))
    everything = Counter(int(token) for i in range(61) for token in documents[i])
    missing = everything - stream_of(samples)
    assert not stream_of(samples) - everything and sum(missing.values()) == tokens - len(packed) * S


@pytest.mark.parametrize("size", [S, 5000])
def test_packed_validation_pads_its_last_window(data, tmp_path, size):
    packed = data.packed("valid", size, seed=3, cache_dir=tmp_path)
    tokens = data.manifest.splits["valid"].tokens
    samples = [packed[i] for i in range(len(packed))]
    assert len(packed) == -(-(tokens - 1) // size)
    assert sum(int(sample["loss_mask"].sum()) for sample in samples) == tokens - 1
    last = min(samples, key=lambda sample: sample["loss_mask"].sum())
    real = int(last["loss_mask"].sum())
    assert last["padding_mask"].tolist() == [place > real for place in range(size)]
    assert (last["tokens"][last["padding_mask"]] == data.tokenizer.pad_id).all()
    assert (last["labels"][real:] == data.tokenizer.pad_id).all()


def test_packed_order_comes_from_the_seed_and_its_index_is_kept(data, tmp_path):
    def tokens(seed, cache):
        packed = data.packed("train", S, seed=seed, cache_dir=tmp_path / cache)
        return [packed[i]["tokens"].tolist() for i in range(len(packed))]

    first = tokens(1, "a")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.npy")}
    assert len(before) == 3
    assert tokens(1, "a") == first == tokens(1, "b") != tokens(2, "a")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert not list(tmp_path.rglob("*.partial"))


def test_samples_chooses_the_mode(data, tmp_path):
    assert len(data.samples("row", "valid", S, seed=0, cache_dir=tmp_path)) == 17
    packed = data.samples("packed", "valid", S, seed=0, cache_dir=tmp_path)
    assert len(packed) == len(data.packed("valid", S, seed=0, cache_dir=tmp_path))
    with pytest.raises(ValueError, match="mode is 'rows': it must be one of row, packed"):
        data.samples("rows", "valid", S, seed=0, cache_dir=tmp_path)


def test_wrong_sizes_are_named(data, tmp_path):
    with pytest.raises(ValueError, match="seq_length is 0"):
        data.rows("train", 0)
    with pytest.raises(ValueError, match="split is 'test'"):
        data.rows("test", S)
    with pytest.raises(ValueError, match="seq_length is 1000000: it must be below the 4664 tokens of the train split"):
        data.packed("train", 1_000_000, seed=0, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "is not prepared data: it has no manifest.json"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "is not a manifest of format"),
        (lambda folder: (folder / MANIFEST).write_text('{"format": "other", "version": 1}'), "format 'other'"),
        (lambda folder: (folder / "valid.idx").unlink(), "is incomplete: valid.idx is missing"),
        (
            lambda folder: (folder / "train.bin").write_bytes(b"short"),
            "is incomplete: train.bin has 5 bytes instead of",
        ),
    ],
)
def test_a_damaged_folder_is_refused(broken, damage, message):
    damage(broken)
    with pytest.raises(ValueError, match=message):
        PreparedData.open(broken)


def test_an_index_of_the_right_size_that_is_none_is_one_line(broken):
    (broken / "train.idx").write_bytes(bytes((broken / "train.idx").stat().st_size))
    with pytest.raises(ConfigError, match=r"data is damaged: train\.idx has changed since it was prepared; prepare it"):
        PreparedData.open(broken)


@pytest.mark.parametrize(
    "change", [lambda old: b"\xff" * len(old), lambda old: old[:10] + bytes([old[10] ^ 1]) + old[11:]]
)
def test_tokens_of_the_right_size_and_other_content_are_noticed_at_the_start(broken, change):
    (broken / "train.bin").write_bytes(change((broken / "train.bin").read_bytes()))
    with pytest.raises(
        ConfigError, match=r"^data\.path: .*data is damaged: train\.bin has changed since it was prepared"
    ):
        PreparedData.open(broken, "data.path")


def test_a_manifest_of_another_vocabulary_than_the_tokenizers_is_refused(broken):
    replace(PreparedData.open(broken).manifest, vocab_size=300).write(broken)
    with pytest.raises(ConfigError, match=r"has vocab_size 300, but the tokenizer has 285 pieces; prepare it again$"):
        PreparedData.open(broken)


def in_place(path, content):
    """Write over a file that is mapped."""
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


@pytest.mark.parametrize("mode", ["row", "packed"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda folder, size: in_place(folder / "train.bin", b"\xff" * size),
            "it contains token 65535, but the tokenizer",
        ),
        (lambda folder, size: in_place(folder / "train.bin", b"short"), "it has 5 bytes instead of"),
        (
            lambda folder, size: in_place(folder / "train.idx", b"\x7f" * (folder / "train.idx").stat().st_size),
            "its index",
        ),
    ],
)
def test_damage_under_a_run_is_one_line_at_the_next_sample(broken, tmp_path, mode, damage, reason):
    """And so it is in a file that is too large to be hashed at the start."""
    samples = PreparedData.open(broken).samples(mode, "train", S, seed=0, cache_dir=tmp_path)
    before = samples[1]
    damage(broken, (broken / "train.bin").stat().st_size)
    with pytest.raises(ConfigError, match=rf"^{broken / 'train.bin'} is damaged: {reason}.*; prepare the data again$"):
        [samples[index] for index in range(len(samples))]
    assert len(before["tokens"]) == S


def test_a_large_file_is_not_read_at_the_start(broken, monkeypatch):
    monkeypatch.setattr("coe_megatron.data.datasets.MAX_HASHED_BYTES", 100)
    in_place(broken / "train.bin", b"\xff" * (broken / "train.bin").stat().st_size)
    with pytest.raises(ConfigError, match="it contains token 65535, but the tokenizer has 285"):
        PreparedData.open(broken).rows("train", S)[0]


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"x" * 99)])
def test_an_index_in_the_run_that_cannot_be_read_is_built_again(data, tmp_path, damage):
    def tokens():
        packed = data.packed("train", S, seed=1, cache_dir=tmp_path)
        return [packed[i]["tokens"].tolist() for i in range(len(packed))]

    first = tokens()
    damage(next(tmp_path.rglob("*sample_index.npy")))
    assert tokens() == first


def test_another_tokenizer_and_changed_bytes_are_noticed(broken):
    manifest = PreparedData.open(broken).manifest
    changed = bytearray((broken / "train.bin").read_bytes())
    changed[10] ^= 1
    (broken / "train.bin").write_bytes(changed)
    with pytest.raises(ConfigError, match=r"train\.bin has changed"):
        manifest.verify(broken)
    replace(manifest, tokenizer_sha256="0" * 64).write(broken)
    with pytest.raises(ConfigError, match=r"tokenizer_sha256 differs from that of tokenizer\.model in files"):
        PreparedData.open(broken)


def batches(count, *, ranks, rank=0, global_batch=8, micro_batch=2, seed=0):
    return StepBatches(
        [Numbers(count)], seed=seed, global_batch=global_batch, micro_batch=micro_batch, dp_rank=rank, dp_size=ranks
    )


def global_order(count, step, ranks):
    """The rows of a step as the ranks together see them, micro-batch by micro-batch."""
    shares = [batches(count, ranks=ranks, rank=rank).for_step(step) for rank in range(ranks)]
    assert all(micro["tokens"].shape == (2, 2) for share in shares for micro in share)
    return [int(row) for micros in zip(*shares, strict=True) for micro in micros for row in micro["tokens"][:, 0]]


@pytest.mark.parametrize("step", [0, 3, 11])
def test_a_step_is_the_same_on_any_number_of_ranks(step):
    expected = [index for _, index in batches(29, ranks=1).indices(step)]
    assert [global_order(29, step, ranks) for ranks in (1, 2, 4)] == [expected] * 3


def test_resuming_is_asking_for_a_later_step():
    source = batches(29, ranks=1)
    straight = [source.indices(step) for step in range(12)]
    assert [batches(29, ranks=1).indices(step) for step in range(7, 12)] == straight[7:]
    assert source.indices(2) == straight[2]


@pytest.mark.parametrize("count", [29, 8, 3])
def test_every_epoch_holds_each_sample_once(count):
    source = batches(count, ranks=1)
    drawn = np.concatenate([source.indices(step) for step in range(count)])[:, 1].reshape(8, count)
    assert all(sorted(epoch) == list(range(count)) for epoch in drawn)
    assert count < 8 or len({tuple(epoch) for epoch in drawn}) == 8


def test_another_seed_is_another_order():
    assert batches(29, ranks=1, seed=0).indices(0) != batches(29, ranks=1, seed=1).indices(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 3}, r"global_batch is 8: it must be a multiple of micro_batch \* dp_size = 2 \* 3 = 6"),
        ({"ranks": 2, "rank": 2}, "dp_rank is 2"),
        ({"ranks": 1, "micro_batch": 0}, "micro_batch is 0"),
        ({"ranks": 1, "global_batch": 0}, "global_batch is 0"),
        ({"ranks": 1, "seed": -1}, "seed is -1"),
        ({"ranks": 1, "count": 0}, "dataset is empty"),
    ],
)
def test_wrong_batches_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        batches(options.pop("count", 29), **options)


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="step is -1"):
        batches(29, ranks=1).for_step(-1)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("count", "limit", "expected"), [(29, None, 29), (24, None, 24), (29, 10, 10), (2, 50, 2)])
def test_validation_covers_every_sample_once(ranks, count, limit, expected):
    shares = [list(validation_batches(Numbers(count), 3, rank, ranks, limit)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    rows = [row for share in shares for batch in share for row in zip(*batch.values(), strict=True)]
    real = sorted(int(tokens[0]) for tokens, loss, _ in rows if loss.all())
    assert real == list(range(expected))
    assert all(padding.all() and not loss.any() for _, loss, padding in rows if not loss.all())
    assert len(rows) - expected < 3 * ranks


def test_wrong_validation_is_named_before_the_first_batch():
    with pytest.raises(ValueError, match="limit is 0"):
        validation_batches(Numbers(3), 1, 0, 1, 0)
    with pytest.raises(ValueError, match="dataset is empty"):
        validation_batches(Numbers(0), 1, 0, 1)


RANK = """
import sys, torch
from coe_megatron.data.datasets import PreparedData
folder, cache, store, rank = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
packed = PreparedData.open(folder).packed("train", 48, seed=5, cache_dir=cache)
print(len(packed), [int(packed[i]["tokens"].sum()) for i in range(len(packed))])
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.ranks
def test_ranks_share_one_index(data, folder, tmp_path):
    paths = [str(folder), str(tmp_path / "cache"), str(tmp_path / "store")]
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK, *paths, str(rank)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=120)[0] for process in started]
    alone = data.packed("train", S, seed=5, cache_dir=tmp_path / "alone")
    expected = f"{len(alone)} {[int(alone[i]['tokens'].sum()) for i in range(len(alone))]}\n"
    assert told == [expected, expected]


@pytest.mark.thorough
def test_importing_the_data_part_starts_no_engine():
    code = "import coe_megatron.data.datasets, sys; print({'megatron.core', 'deepspeed'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_share_of_documents_that_rows_cut(data):
    rows = data.rows("train", 100_000)
    labels = [int(rows[i]["loss_mask"].sum()) for i in range(len(rows))]
    for seq_length in (1, 16, 64, 10_000):
        assert data.truncated_fraction(seq_length) == sum(count > seq_length for count in labels) / len(labels)
