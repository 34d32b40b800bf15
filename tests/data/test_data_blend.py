"""Blends and named validation sets: proportions, an order that nothing but the seed decides, and what is refused."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from coe_megatron.config.settings import BlendPart, DataSettings
from coe_megatron.data.datasets import BlendedOrder, StepBatches
from coe_megatron.data.folders import check_folders
from coe_megatron.data.manifest import TOKENIZER
from coe_megatron.data.prepare import prepare
from coe_megatron.data.prepare_settings import PrepareSettings
from coe_megatron.data.run_data import RunData

SIZES, WEIGHTS = (7, 30, 11), (2.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """Three folders: a and b share a tokenizer, c has another; a document says which it is."""
    parent = tmp_path_factory.mktemp("prepared")
    common: dict = {"valid_fraction": 0.2}
    for name, count in (("a", 40), ("b", 25), ("c", 30)):
        lines = (json.dumps({"text": f"{name} has {number} apples and {number % 7} pears"}) for number in range(count))
        (parent / f"{name}.jsonl").write_text("\n".join(lines))
        source = {"tokenizer": parent / "a" / TOKENIZER} if name == "b" else {"vocab_size": 290}
        prepare(PrepareSettings(output=parent / name, inputs=(parent / f"{name}.jsonl",), **source, **common))
    return parent


def blend(parent, *names, **more):
    parts = [BlendPart(str(parent / name), weight) for name, weight in zip(names, (1.0, 3.0), strict=False)]
    return DataSettings(blend=parts, **more)


def order(seed=0):
    return BlendedOrder(SIZES, WEIGHTS, seed)


def test_each_corpus_has_its_share_at_every_place():
    counts, drawn = Counter(), order().between(0, 400)
    for place, (corpus, _) in enumerate(drawn, 1):
        counts[corpus] += 1
        for index, weight in enumerate(WEIGHTS):
            assert abs(counts[index] - place * weight / sum(WEIGHTS)) <= 1.5, (place, index)


def test_each_corpus_goes_through_epochs_of_its_own():
    drawn = order().between(0, 400)
    for corpus, size in enumerate(SIZES):
        samples = [sample for of, sample in drawn if of == corpus]
        epochs = [samples[start : start + size] for start in range(0, len(samples) - size + 1, size)]
        assert len(epochs) > 2 and all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_how_far_one_looks_and_from_where_changes_nothing():
    whole, by_steps = order().between(0, 3000), order()
    assert [place for start in range(0, 3000, 30) for place in by_steps.between(start, start + 30)] == whole
    assert by_steps.between(10, 20) == whole[10:20]
    assert order().between(2970, 3000) == whole[2970:]
    assert order(seed=1).between(0, 30) != whole[:30]


class Named:
    """Samples that tell their corpus and index."""

    def __init__(self, corpus, size):
        self.corpus, self.size = corpus, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"tokens": torch.tensor([self.corpus, index])}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_step_is_the_same_on_any_number_of_ranks(ranks):
    corpora = [Named(corpus, size) for corpus, size in enumerate(SIZES)]
    share = {"seed": 3, "global_batch": 8, "micro_batch": 2}
    expected = StepBatches(corpora, WEIGHTS, **share, dp_rank=0, dp_size=1).indices(5)
    shares = [StepBatches(corpora, WEIGHTS, **share, dp_rank=rank, dp_size=ranks).for_step(5) for rank in range(ranks)]
    micros = [micro for step in zip(*shares, strict=True) for micro in step]
    assert [tuple(row) for micro in micros for row in micro["tokens"].tolist()] == expected


def test_an_empty_corpus_is_refused():
    with pytest.raises(ValueError, match="dataset is empty"):
        StepBatches([Named(0, 3), Named(1, 0)], seed=0, global_batch=1, micro_batch=1, dp_rank=0, dp_size=1)


@pytest.mark.parametrize("mode", ["row", "packed"])
def test_a_blend_is_opened_with_a_validation_set_for_each_folder(parent, tmp_path, mode):
    data = RunData.open(blend(parent, "a", "b", samples=mode))
    assert data.weights == [1.0, 3.0] and data.tokenizer_size == 290
    train = data.training_samples(24, seed=1, cache_dir=tmp_path)
    valid = data.validation_samples(24, seed=1, cache_dir=tmp_path)
    assert list(valid) == ["a", "b"]
    decode = data.corpora[0].tokenizer.decode
    for name, samples in (("a", train[0]), ("b", train[1]), *valid.items()):
        assert f"{name} has" in decode(samples[0]["tokens"].tolist() + samples[0]["labels"].tolist())
    assert data.truncated_fraction(1) == (1.0 if mode == "row" else 0.0)


def test_validation_sets_are_named_by_the_settings(parent):
    assert list(RunData.open(DataSettings(path=str(parent / "a"))).validation) == ["valid"]
    named = RunData.open(DataSettings(path=str(parent / "a"), validation={"near": str(parent / "b")}))
    assert named.validation["near"].folder == parent / "b" and named.corpora[0].folder == parent / "a"


def test_folders_of_several_tokenizers_are_refused(parent):
    with pytest.raises(ValueError, match="its tokenizer differs from that of") as caught:
        RunData.open(blend(parent, "a", "c"))
    told = str(caught.value)
    assert told.startswith(f"data.blend.1.path is {parent / 'c'}: ") and f"data.blend.0.path ({parent / 'a'})" in told
    validated = DataSettings(path=str(parent / "a"), validation={"far": str(parent / "c")})
    with pytest.raises(ValueError, match=r"^data\.validation\.far is "):
        check_folders(validated, needed=False)


def test_a_missing_folder_is_an_error_where_data_is_needed(parent):
    settings = blend(parent, "nowhere", "a")
    with pytest.raises(ValueError, match=r"data\.blend\.0\.path: .*nowhere is not prepared data"):
        check_folders(settings, needed=True)
    found = check_folders(settings, needed=False)
    assert found is not None and found.vocab_size == 290
    assert check_folders(DataSettings(path=str(parent / "nowhere")), needed=False) is None


def test_a_broken_folder_is_always_an_error(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"^data\.path: .*is not a manifest"):
        check_folders(DataSettings(path=str(tmp_path)), needed=False)


def test_checking_folders_needs_no_torch():
    root = Path(__file__).parents[2]
    code = "import coe_megatron.data.folders, sys; print({'torch', 'megatron', 'sentencepiece'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout == "set()\n"


def test_workers_need_no_torch():
    root = Path(__file__).parents[2]
    code = (
        "import coe_megatron.data.encode, coe_megatron.data.workers, sys; print({'torch', 'tqdm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout == "set()\n"
