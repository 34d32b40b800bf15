"""New checkpoints out of old ones, without a model: the same tensors in other files, without moments, or their mean."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import DeepSpeedEngine
from engine_build import Named, make_engine, take_steps
from model_build import reset_megatron
from ranks import run_ranks

from coe_megatron.checkpoint import listing, save_load, tools
from coe_megatron.checkpoint.names import name_of
from coe_megatron.checkpoint.storage import OPTIMIZER, Reader
from coe_megatron.zero import optimizer_states

TENSOR = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
PIPELINE = {"pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def run(megatron_groups: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three checkpoints of a run in bf16, one process."""
    folder = tmp_path_factory.mktemp("run")
    reset_megatron()
    save_three_steps(folder / "checkpoints", "bf16")
    yield folder
    reset_megatron()


def save_three_steps(folder: Path, precision: str, layers: int = 1) -> None:
    engine = make_engine(4, precision=precision, layers=layers)
    for step in range(3):
        take_steps(engine, step, 1)
        state = {"step": step + 1, "tokens": 10 * (step + 1), "tokenizer": "T"}
        save_load.save(folder, step + 1, engine, state, keep=9)


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / name_of(step)


def held(engine: DeepSpeedEngine) -> Named:
    found = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
    for name, parameter in engine.module.named_parameters():
        found |= {
            f"{kind}.{name}": optimizer_states.read(engine, parameter, kind).clone() for kind in optimizer_states.KINDS
        }
    return found


def loaded(folder: Path, layers: int = 1) -> tuple[dict[str, Any] | None, Named]:
    engine = make_engine(4, precision="bf16", layers=layers, seed=2)
    return save_load.load_latest(folder, engine), held(engine)


@pytest.mark.slow
def test_a_checkpoint_written_anew_is_the_same(run: Path, single_rank: None, tmp_path: Path) -> None:
    """Of a run's folder the newest."""
    out = tools.reshard(run, tmp_path / name_of(3), files=3)
    assert len(list((out / "tensors").glob("*.distcp"))) == 3
    state, tensors = loaded(tmp_path)
    expected_state, expected = loaded(run / "checkpoints")
    assert state == expected_state == {"step": 3, "tokens": 30, "tokenizer": "T"}
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert (out / "random" / "00000.pt").read_bytes() == (checkpoint(run, 3) / "random" / "00000.pt").read_bytes()
    again = tools.reshard(out, tmp_path / "again", files=1)
    assert len(list((again / "tensors").glob("*.distcp"))) == 1 and listing.problem(again) is None


@pytest.mark.slow
def test_without_moments_it_begins_a_run_and_continues_none(run: Path, single_rank: None, tmp_path: Path) -> None:
    out = tools.reshard(checkpoint(run, 2), tmp_path / name_of(2), weights_only=True)
    kinds = {key.split(".")[1] for key in Reader(out / "tensors").entries if key.startswith(OPTIMIZER)}
    assert kinds == {optimizer_states.MASTER} and not (out / "random").exists()
    assert size(out) < 0.5 * size(checkpoint(run, 2))
    engine = make_engine(4, precision="bf16", layers=1, seed=2)
    save_load.load_weights(out, engine)
    found, expected = held(engine), loaded_weights(checkpoint(run, 2))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match=r"holds weights only: start a run from it with training\.warm_start"):
        save_load.load_latest(tmp_path, engine)


def loaded_weights(source: Path, layers: int = 1) -> Named:
    engine = make_engine(4, precision="bf16", layers=layers, seed=3)
    save_load.load_weights(source, engine)
    return {name: value for name, value in held(engine).items() if not name.startswith(optimizer_states.MOMENTS)}


def size(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in (checkpoint / "tensors").glob("*.distcp"))


@pytest.mark.slow
def test_the_mean_is_that_of_the_masters(run: Path, single_rank: None, tmp_path: Path) -> None:
    out = tools.average(tools.latest(run, 3), tmp_path / "mean")
    each = [loaded_weights(checkpoint(run, step)) for step in (1, 2, 3)]
    found = loaded_weights(out)
    assert {name.split(".")[0] for name in found} >= {optimizer_states.MASTER, "decoder"}
    for name, parameter in found.items():
        if name.startswith(optimizer_states.MASTER):
            mean = torch.stack([weights[name] for weights in each]).double().mean(0).float()
            torch.testing.assert_close(parameter, mean, rtol=0, atol=1e-7)
            assert not torch.equal(parameter, each[-1][name]) or parameter.unique().numel() == 1
            weight = name.removeprefix(f"{optimizer_states.MASTER}.")
            assert torch.equal(found[weight], parameter.bfloat16())
    facts = json.loads((out / "state.json").read_text())
    assert facts["state"]["step"] == 3 and facts["derived_from"] == [name_of(step) for step in (1, 2, 3)]


@pytest.mark.thorough
def test_what_a_checkpoint_holds(run: Path, single_rank: None) -> None:
    contents = tools.inspect(run)
    engine = make_engine(4, precision="bf16", layers=1)
    assert contents.checkpoint == checkpoint(run, 3)
    assert contents.parameters == sum(parameter.numel() for parameter in engine.module.parameters())
    experts = contents.tensors["decoder.layers.mlp.experts.experts.linear_fc1.weight"]
    assert (experts.shape, experts.dtype, experts.parts) == ([1, 8, 48, 32], "bfloat16", 16)
    assert contents.tensors["optimizer.exp_avg.output_layer.weight"].dtype == "float32"
    assert contents.bytes == sum(path.stat().st_size for path in checkpoint(run, 3).rglob("*") if path.is_file())
    shown = contents.table()
    assert "3, after 30 tokens" in shown and "world size 1, tensor 1" in shown and "exp_avg" not in shown


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("action", "said"),
    [
        (lambda run, out: tools.average([run], out), "1 checkpoint given: an average needs two"),
        (lambda run, out: tools.latest(run, 4), "holds 3 finished checkpoints, but 4 are requested"),
        (lambda run, out: tools.average([run, out / "tokenizer"], out / "x"), "is of another tokenizer than"),
        (lambda run, out: tools.average([run, out / "model"], out / "x"), "is of another model than"),
        (lambda run, out: tools.reshard(run, run), "exists: name another folder, or use --overwrite"),
        (lambda run, out: tools.reshard(run, out, overwrite=True), "is not a checkpoint and will not be replaced"),
        (lambda run, out: tools.reshard(out / "incomplete", out / "x"), "is not complete: state.json is missing"),
        (lambda run, out: list(tools.verify(out)), "holds no checkpoint"),
        (lambda run, out: tools.inspect(out), "holds no checkpoint"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(action: Any, said: str, run: Path, tmp_path: Path) -> None:
    for name in ("tokenizer", "model", "incomplete"):
        shutil.copytree(checkpoint(run, 1), tmp_path / name)
    rewrite(tmp_path / "tokenizer")
    entries = dict(Reader(checkpoint(run, 1) / "tensors").entries)
    del entries["output_layer.weight"]
    shutil.rmtree(tmp_path / "model" / "tensors")
    write_entries(tmp_path / "model" / "tensors", entries, checkpoint(run, 1))
    (tmp_path / "incomplete" / "state.json").unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r".") as raised:
        action(run, tmp_path)
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


def rewrite(folder: Path) -> None:
    facts = json.loads((folder / "state.json").read_text())
    facts["state"]["tokenizer"] = "another"
    (folder / "state.json").write_text(json.dumps(facts))
    rewrite_manifest(folder)


def write_entries(folder: Path, entries: dict, source: Path) -> None:
    folder.mkdir()
    tools.storage.write(folder, entries, Reader(source / "tensors").part)
    rewrite_manifest(folder.parent)


def rewrite_manifest(folder: Path) -> None:
    (folder / tools.MANIFEST).unlink()
    tools.write_manifest(folder)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("layout", [TENSOR, PIPELINE], ids=["tensor and expert", "pipeline"])
def test_parts_of_parallel_ranks_go_through(layout: dict[str, int], single_rank: None, tmp_path: Path) -> None:
    """Saved in fp32 by two ranks, read in bf16 by one process before and after."""
    run_ranks(save_three_steps, 2, tmp_path / "checkpoints", "fp32", 2, **layout)
    contents = tools.inspect(tmp_path)
    tensor, stages, expert = (layout.get(f"{kind}_model_parallel_size", 1) for kind in ("tensor", "pipeline", "expert"))
    told = {
        "world_size": 2,
        "tensor": tensor,
        "pipeline": stages,
        "expert": expert,
        "expert_tensor": 1,
        "zero_stage": 1,
        "context": 1,
        "virtual_pipeline": 1,
    }
    assert asdict(contents.metadata.layout) == told
    assert contents.tensors["output_layer.weight"].parts == tensor
    tools.reshard(tmp_path, tmp_path / "other" / name_of(3))
    (state, found), (_, expected) = loaded(tmp_path / "other", 2), loaded(tmp_path / "checkpoints", 2)
    assert state is not None and state["step"] == 3
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    each = [loaded_weights(checkpoint(tmp_path, step), 2) for step in (2, 3)]
    mean = loaded_weights(tools.average(tools.latest(tmp_path, 2), tmp_path / "mean"), 2)
    for name in (name for name in mean if name.startswith(optimizer_states.MASTER)):
        torch.testing.assert_close(mean[name], (each[0][name] + each[1][name]) / 2, rtol=0, atol=1e-7)
