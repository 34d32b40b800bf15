"""Checkpoints: a resumed run goes on bit by bit, on any layout, and what is torn is skipped by name."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from engine_build import Named, Trace, joined, make_engine, take_steps
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from model_build import errors
from ranks import run_ranks

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.checkpoint import save_load as store
from coe_megatron.checkpoint import sharding as saved_states
from coe_megatron.checkpoint.integrity import MANIFEST
from coe_megatron.distributed import collectives as collective
from coe_megatron.distributed import process_groups as groups
from coe_megatron.zero import optimizer_states as states

STATE = {"step": 2, "tokens": 77}


RUNS = {"fp32": ChainSettings(iterations=2), "bf16": ChainSettings(iterations=2, gating="shared_router")}


@pytest.mark.ranks
def test_a_resumed_run_goes_on_bit_by_bit(tmp_path: Path) -> None:
    """Two ranks with EP 2, dropout and accumulation 2, in other processes than those that saved."""
    uninterrupted = run_ranks(save_and_go_on, 2, tmp_path, expert_model_parallel_size=2)
    resumed = run_ranks(resume, 2, tmp_path, expert_model_parallel_size=2)
    for precision in RUNS:
        for left, right in zip(uninterrupted, resumed, strict=True):
            assert left[precision].losses == right[precision].losses
            assert left[precision].norms == right[precision].norms
            assert same(left[precision].gradients, right[precision].gradients)
            assert same(left[precision].weights, right[precision].weights)


def save_and_go_on(folder: Path) -> dict[str, Trace]:
    return {precision: save_after_two_steps(folder / precision, precision) for precision in RUNS}


def save_after_two_steps(folder: Path, precision: str) -> Trace:
    engine = make_engine(precision=precision, dropout=0.1, chain=RUNS[precision])
    groups.seed_dropout(5)
    take_steps(engine, 0, 2)
    store.save(folder, 2, engine, STATE, keep=1)
    return take_steps(engine, 2, 2)


def resume(folder: Path) -> dict[str, Trace]:
    return {precision: load_and_go_on(folder / precision, precision) for precision in RUNS}


def load_and_go_on(folder: Path, precision: str) -> Trace:
    engine = make_engine(precision=precision, dropout=0.1, chain=RUNS[precision], seed=2)
    assert store.load_latest(folder, engine) == STATE
    return take_steps(engine, 2, 2)


@pytest.mark.ranks
def test_another_layout_reads_the_same_weights_and_states(tmp_path: Path) -> None:
    """From two ranks with EP 2 to one."""
    ranks = run_ranks(save_and_tell, 2, tmp_path, expert_model_parallel_size=2)
    ((alone, held),) = run_ranks(load_and_tell, 1, tmp_path)
    for name, state in held.items():
        parts = [states_of_rank[name] for _, states_of_rank in ranks]
        assert torch.equal(state, torch.cat(parts) if ".experts." in name else parts[0]), name
    together = joined([trace for trace, _ in ranks], "ep2")
    assert max(errors(alone.gradients, together.gradients).values()) < 1e-5
    assert alone.losses == pytest.approx(together.losses, rel=1e-5)


def save_and_tell(folder: Path) -> tuple[Trace, Named]:
    engine = make_engine()
    take_steps(engine, 0, 2)
    store.save(folder, 2, engine, STATE, keep=1)
    held = optimizer_states(engine)
    return take_steps(engine, 2, 2), held


def load_and_tell(folder: Path) -> tuple[Trace, Named]:
    engine = make_engine(seed=2)
    assert store.load_latest(folder, engine) == STATE
    held = optimizer_states(engine)
    return take_steps(engine, 2, 2), held


def optimizer_states(engine) -> Named:
    parameters = engine.module.named_parameters()
    return {f"{kind}.{name}": states.read(engine, p, kind).clone() for name, p in parameters for kind in states.KINDS}


def same(left: Named, right: Named) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.ranks
def test_torn_checkpoints_are_named_skipped_and_replaced(tmp_path: Path) -> None:
    found, other_rank = run_ranks(damage, 2, tmp_path, expert_model_parallel_size=2)
    assert found["nothing there"] is None
    assert found["loaded"] == other_rank["loaded"] == {"step": 1}
    for step, reason in REASONS.items():
        line = f"checkpoint {tmp_path / step} is skipped: {reason}"
        assert any(said.startswith(line) for said in found["said"]), line
        assert step in found["left"], "it stays where it is"
    assert len(found["said"]) == len(REASONS) and not other_rank["said"]
    assert found["after a new save"] == ["step-00000004", "step-00000005"], "what was not finished only takes room"
    assert found["loaded again"] == {"step": 5}
    assert "is of another model: decoder" in found["other model"] and "\n" not in found["other model"]
    assert found["after going on"] == ["step-00000003", *found["after a new save"]], "what lies beyond step 3 stays"
    assert found["loaded after that"] == {"step": 3}
    assert found["milestones"] == ["step-00000002", "step-00000003", "step-00000008"], "2 and 3 are milestones"


REASONS = {
    "step-00000006.tmp": "its save was not finished",
    "step-00000005": f"{MANIFEST} is missing",
    "step-00000004": f"{MANIFEST} cannot be read",
    "step-00000003": "tensors/__0_0.distcp has 1000 bytes instead of",
    "step-00000002": "the content of tensors/__1_0.distcp has changed",
}


def damage(folder: Path) -> dict:
    """Spoil one checkpoint after the other, then save step 5 once more; then spoil 4 and 5 and go on to step 3."""
    engine = make_engine(layers=1)
    found = {"nothing there": store.load_latest(folder, engine)}
    for step in range(1, 7):
        store.save(folder, step, engine, {"step": step}, keep=9)
    if torch.distributed.get_rank() == 0:
        tear(folder)
    torch.distributed.barrier()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        found["loaded"] = store.load_latest(folder, engine)
    found["said"] = said.getvalue().splitlines()
    found["left"] = names(folder)
    found["other model"] = refusal(folder)
    store.save(folder, 4, engine, {"step": 4}, keep=9)
    store.save(folder, 5, engine, {"step": 5}, keep=2)
    found["after a new save"] = names(folder)
    with contextlib.redirect_stderr(io.StringIO()):
        found["loaded again"] = store.load_latest(folder, engine)
    if torch.distributed.get_rank() == 0:
        for step in ("step-00000004", "step-00000005"):
            flip_a_bit(folder / step / "tensors/__0_0.distcp")
    torch.distributed.barrier()
    store.save(folder, 2, engine, {"step": 2}, keep=1)
    store.save(folder, 3, engine, {"step": 3}, keep=1)
    found["after going on"] = names(folder)
    with contextlib.redirect_stderr(io.StringIO()):
        found["loaded after that"] = store.load_latest(folder, engine)
    for step in (2, 3, 7, 8):
        store.save(folder, step, engine, {"step": step}, keep=1, milestones=(2, 3))
    found["milestones"] = names(folder)
    return found


def tear(folder: Path) -> None:
    (folder / "step-00000006").rename(folder / "step-00000006.tmp")
    (folder / "step-00000005" / MANIFEST).unlink()
    (folder / "step-00000004" / MANIFEST).write_text("{")
    cut = folder / "step-00000003/tensors/__0_0.distcp"
    cut.write_bytes(cut.read_bytes()[:1000])
    flip_a_bit(folder / "step-00000002/tensors/__1_0.distcp")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def refusal(folder: Path) -> str:
    """What is said to a model with one more layer."""
    with contextlib.redirect_stderr(io.StringIO()), pytest.raises(ValueError) as raised:
        store.load_latest(folder, make_engine(layers=2))
    return str(raised.value)


def names(folder: Path) -> list[str]:
    torch.distributed.barrier()
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.ranks
def test_a_checkpoint_holds_no_pickled_objects_and_keys_by_parameter(tmp_path: Path) -> None:
    (keys,) = run_ranks(list_keys, 1, tmp_path)
    assert not [key for key in keys if "_extra_state" in key]
    weights = {key for key in keys if not key.startswith("optimizer.")}
    assert "decoder.layers.mlp.experts.experts.linear_fc1.weight" in weights
    for kind in states.KINDS:
        assert {f"optimizer.{kind}.{key}" for key in weights} <= keys
    facts = json.loads((tmp_path / "step-00000003" / "state.json").read_text())
    layout = {"world_size": 1, "tensor": 1, "pipeline": 1, "expert": 1, "expert_tensor": 1, "zero_stage": 1}
    layout |= {"context": 1, "virtual_pipeline": 1}
    assert facts == {"layout": layout, "optimizer_steps": 1, "state": {"step": 3}}


def list_keys(folder: Path) -> set[str]:
    engine = make_engine(8, chain=RUNS["bf16"])
    take_steps(engine, 0, 1)
    path = store.save(folder, 3, engine, {"step": 3}, keep=1)
    return set(load_sharded_metadata(str(path / "tensors")))


@pytest.mark.parametrize("lost", ["in the weights", "in the manifest"])
def test_a_rank_that_is_lost_in_a_save_is_not_a_disk_that_is_full(
    lost: str, single_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run may be started again, and a person need not make room."""

    def gone(*_: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(
        *((saved_states, "write_tensors") if lost == "in the weights" else (store, "write_manifest")), gone
    )
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        store.save(tmp_path, 1, make_engine(), {"step": 1}, keep=1)


def test_what_torch_save_makes_of_a_full_disk_reaches_all_ranks() -> None:
    """It is a RuntimeError; the other ranks would wait for the one that left."""
    with pytest.raises(OSError, match="enforce fail"):
        collective.run_on_all(lambda: torch.save(torch.zeros(10**5), "/dev/full"), None)
