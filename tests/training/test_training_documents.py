"""Documents that share a packed sample: with the reset none knows of the others, without it they do."""

import json
from pathlib import Path

import pytest
import torch
from model_build import make_config, make_gpt, make_mla_config

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.data.datasets import PreparedData
from coe_megatron.data.prepare import prepare
from coe_megatron.data.prepare_settings import PrepareSettings
from coe_megatron.data.samples import PackedDataset
from coe_megatron.model import coe_layer_spec
from coe_megatron.training.evaluation import Batch, forward

LENGTH = 30


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    parent = tmp_path_factory.mktemp("data")
    texts = [f"{number} pears" for number in range(60)]
    (parent / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(PrepareSettings(output=parent / "out", inputs=(parent / "in.jsonl",), vocab_size=280, valid_fraction=0.2))
    return PreparedData.open(parent / "out")


def _packed(data: PreparedData, folder: Path, reset: bool) -> PackedDataset:
    return data.packed("train", LENGTH, seed=1, cache_dir=folder, reset_at_documents=reset)


def _document(tokens: torch.Tensor, eos: int) -> slice:
    """The second whole document of a window."""
    ends = (tokens == eos).nonzero().flatten().tolist()
    return slice(ends[1] + 1, ends[2] + 1)


def _batch(sample: Batch) -> Batch:
    return {name: tensor[None] for name, tensor in sample.items()}


def _alone(tokens: torch.Tensor) -> Batch:
    return {
        "tokens": tokens[None, :-1],
        "labels": tokens[None, 1:],
        "position_ids": torch.arange(len(tokens) - 1)[None],
        "padding_mask": torch.zeros(1, len(tokens) - 1, dtype=torch.bool),
    }


@pytest.mark.parametrize("attention", ["mha", "mla"])
@pytest.mark.parametrize("reset", [True, False])
def test_a_document_in_a_pack_is_as_alone_if_asked(
    single_rank: None, data: PreparedData, tmp_path: Path, reset: bool, attention: str
) -> None:
    config = make_mla_config(num_layers=2) if attention == "mla" else make_config(num_layers=2)
    model = make_gpt(config, coe_layer_spec(config, ChainSettings(2)), vocab=data.manifest.vocab_size)
    sample = _packed(data, tmp_path, reset)[0]
    place = _document(sample["tokens"], data.tokenizer.eos_id)
    packed = forward(model, _batch(sample))[0, place][:-1]
    alone = forward(model, _alone(sample["tokens"][place]))[0]
    assert len(alone) > 3 and alone.std() > 0.01
    assert torch.allclose(packed, alone, atol=1e-5) is reset


def test_the_mask_forbids_the_future_and_other_documents(data: PreparedData, tmp_path: Path) -> None:
    sample, plain = _packed(data, tmp_path, True)[0], _packed(data, tmp_path, False)[0]
    assert sample["attention_mask"].shape == (1, LENGTH, LENGTH) and "attention_mask" not in plain
    assert torch.equal(sample["tokens"], plain["tokens"])
    document = torch.cat([torch.zeros(1), (sample["tokens"] == data.tokenizer.eos_id).cumsum(0)[:-1]])
    starts = {int(number): int((document == number).nonzero()[0]) for number in document.unique()}
    assert len(starts) > 3
    for place in range(LENGTH):
        assert sample["position_ids"][place] == place - starts[int(document[place])]
        allowed = ~sample["attention_mask"][0, place]
        assert allowed.tolist() == [k <= place and bool(document[k] == document[place]) for k in range(LENGTH)]
