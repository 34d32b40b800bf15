"""Answers on the way: rank 0 gathers the weights that a checkpoint has, on any layout, and training does not change."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_build import make_engine
from programs import python, torchrun
from ranks import run_ranks

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.checkpoint import listing, save_load
from coe_megatron.convert.weights import Weights
from coe_megatron.run.metrics_log import read_metrics
from coe_megatron.training.answer_accuracy import gather

LAYOUTS = {
    "EP 2": {"expert_model_parallel_size": 2},
    "TP 2": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    "PP 2": {"pipeline_model_parallel_size": 2},
}


def gathered_and_saved(folder: Path, stage: int) -> dict[str, torch.Tensor] | None:
    engine = make_engine(4, layers=2, chain=ChainSettings(2), stage=stage)
    save_load.save(folder, 1, engine, {"step": 1, "tokens": 0}, keep=1)
    return gather(engine)


@pytest.mark.ranks
@pytest.mark.parametrize(("layout", "stage"), [("EP 2", 3), ("TP 2", 1), ("PP 2", 1)])
def test_rank_0_gathers_what_a_checkpoint_has(layout: str, stage: int, tmp_path: Path) -> None:
    whole, other = run_ranks(gathered_and_saved, 2, tmp_path, stage, **LAYOUTS[layout])
    assert other == {}
    weights = Weights(listing.find(tmp_path / "step-00000001"))
    stored = {key for key in weights._reader.entries if not key.startswith("optimizer.")}
    assert whole.keys() == stored
    for key, tensor in whole.items():
        assert torch.equal(tensor, weights.read(weights.place(key))), key


@pytest.mark.usefixtures("single_rank")
def test_each_weight_is_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int, int]] = []
    send = torch.distributed.gather_object

    def noted(parts: Any, received: Any) -> None:
        sizes.append((len(pickle.dumps(parts)), sum(part.data.nbytes for part in parts), len(parts)))
        send(parts, received)

    monkeypatch.setattr(torch.distributed, "gather_object", noted)
    gather(make_engine(4, layers=4))
    [(sent, weights, parts)] = sizes
    assert weights < sent < weights + 2000 * parts, "parts are views of larger tensors"


@pytest.mark.run
def test_answers_are_logged_and_change_no_step(config: Path, prepared: Path, finished: Path, tmp_path: Path) -> None:
    settings = (f"data.path={prepared}", f"output={tmp_path / 'run'}", "training.evaluate_answers=6")
    done = torchrun("launch/pretrain_coe.py", config, *settings)
    assert done.returncode == 0, done.stderr
    lines, truth = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "run", finished))
    asked = [line["step"] for line in lines if "answer_accuracy" in line]
    assert asked == [line["step"] for line in truth if "valid_loss" in line] and len(asked) == 3
    assert all(
        line["answer_accuracy"] * 6 == pytest.approx(round(line["answer_accuracy"] * 6))
        for line in lines
        if "answer_accuracy" in line
    )
    for line, true in zip(lines, truth, strict=True):
        assert (line.get("train_loss"), line.get("valid_loss")) == (true.get("train_loss"), true.get("valid_loss"))


@pytest.mark.run
def test_questions_of_a_task_are_counted_by_hops(config: Path, tmp_path: Path) -> None:
    sizes = ("--entities", 8, "--relations", 4, "--hops", 1, 2)
    done = python("launch/prepare_data.py", "--builtin", 300, "--task", "recall", *sizes, "--output", tmp_path / "data")
    assert done.returncode == 0, done.stderr
    settings = (f"data.path={tmp_path / 'data'}", "data.answer_tokens=1", "model.seq_length=4", "parallel.expert=1")
    asked = (f"output={tmp_path / 'run'}", "training.evaluate_answers=40", "training.steps=2")
    done = python("launch/pretrain_coe.py", config, *settings, *asked)
    assert done.returncode == 0, done.stderr
    for line in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        if "valid_loss" in line:
            groups = line["answer_groups"]
            assert list(groups) == ["1 hop", "2 hops"] and sum(each["problems"] for each in groups.values()) == 40
            right = sum(each["accuracy"] * each["problems"] for each in groups.values())
            assert line["answer_accuracy"] * 40 == pytest.approx(right)
    shown = python("launch/evaluate.py", tmp_path / "run", "--answers", "builtin", "--problems", 9)
    assert shown.returncode == 0 and "2 hops: accuracy 0." in shown.stdout, shown.stderr


@pytest.mark.run
@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("training.answers_file=nowhere.jsonl", "nowhere.jsonl"),
        ("training.evaluate_answers=-1", "training.evaluate_answers is -1"),
    ],
)
def test_a_mistake_is_one_line(setting: str, line: str, config: Path, prepared: Path, tmp_path: Path) -> None:
    settings = (
        f"data.path={prepared}",
        f"output={tmp_path / 'run'}",
        "parallel.expert=1",
        "training.evaluate_answers=2",
    )
    done = python("launch/pretrain_coe.py", config, *settings, setting)
    assert done.returncode == 2 and line in done.stderr and "Traceback" not in done.stderr, done.stderr
