"""Runs on indexed datasets of Megatron as they are, alone and in a blend; stopped and resumed without a difference."""

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from programs import losses, python

from coe_megatron.run.metrics_log import read_metrics

pytestmark = pytest.mark.run


def write(prefix: Path, seed: int) -> Path:
    random, builder = np.random.default_rng(seed), IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(30):
        document = np.array([*random.integers(4, 500, random.integers(5, 60)), 3], np.uint16)
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize("kind", ["alone", "blend"])
def test_two_steps_and_resumed_after_one(config: Path, prepared: Path, tmp_path: Path, kind: str) -> None:
    prefix, far = write(tmp_path / "text_document", 0), write(tmp_path / "far", 1)
    data = {
        "alone": [f"data.path={prefix}", f"data.validation={{far: {far}}}", "model.vocab_size=512"],
        "blend": [
            f"data.blend=[{{path: {prefix}, weight: 1}}, {{path: {prepared}, weight: 1}}]",
            f"data.validation={{far: {far}, near: {prepared}}}",
            "data.samples=packed",
        ],
    }[kind]
    common = ("launch/pretrain_coe.py", config, *data, "parallel.expert=1", "training.global_batch=4")
    often = ("training.save_every=1", "training.evaluate_every=2", "optimizer.warmup=0")
    for folder, steps in (("whole", 2), ("parted", 1), ("parted", 2)):
        done = python(*common, *often, f"training.steps={steps}", f"output={tmp_path / folder}")
        assert done.returncode == 0, done.stderr
    assert "resumed at step 1" in done.stderr
    assert losses(tmp_path / "whole") == losses(tmp_path / "parted") and len(losses(tmp_path / "whole")) == 2
    last = read_metrics(tmp_path / "parted" / "metrics.jsonl")[-1]
    assert 4 < last["valid_loss"] < 8 and "valid_bits_per_byte" not in last
    if kind == "blend":
        assert last["valid"]["far"].keys() == {"loss"} and last["valid"]["near"].keys() == {"loss", "bits_per_byte"}
        return
    write(prefix, 2)
    changed = python(*common, *often, "training.steps=3", f"output={tmp_path / 'whole'}")
    assert changed.returncode == 2 and "data.path has another text (or order or weights) than" in changed.stderr
