"""NaN and exploding losses: steps are skipped, then the run rolls back and skips data, finally it gives up."""

import json
import math
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from attempts import Killed, attempt, planted, small
from ranks import run_ranks

from coe_megatron.checkpoint.manager import TrainState
from coe_megatron.config import RunConfig
from coe_megatron.config.settings import RecoverySettings
from coe_megatron.data.datasets import StepBatches
from coe_megatron.errors import ConfigError
from coe_megatron.model.layer import routers
from coe_megatron.run.metrics_log import read_metrics
from coe_megatron.training import evaluation, loop, recovery
from coe_megatron.training.loop import Pretraining, StoppedOnRequest
from coe_megatron.training.progress import Progress

pytestmark = pytest.mark.thorough

NAN = math.nan
TWICE = {5: NAN, 6: NAN}  # with `skips` 2 the run rolls back after step 7, to step 4 and past the data of steps 5 to 7
POLICY = {"skips": 2}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a run says."""
    heard: list[str] = []
    monkeypatch.setattr(Progress, "say", lambda _, text: heard.append(text))
    return heard


def lines(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder / "metrics.jsonl")


def losses(folder: Path) -> dict[int, float | None]:
    return {line["step"]: line["train_loss"] for line in lines(folder)[1:]}


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


def killed_before(step: int, after_rollback: bool = True) -> Callable[[Pretraining, int], None]:
    def kill(run: Pretraining, at: int) -> None:
        if at == step and (run.state.rollbacks or not after_rollback):
            raise Killed

    return kill


def test_a_nan_in_one_batch_leaves_one_step_out(
    single_rank: None, prepared: Path, tmp_path: Path, said: list[str]
) -> None:
    with planted({5: NAN}):
        attempt(small(prepared, tmp_path, log_every=3))
    found = {line["step"]: line for line in lines(tmp_path)}
    assert [found[step]["skipped_steps"] for step in (3, 6, 9, 12)] == [0, 1, 1, 1]
    assert found[6]["train_loss"] is None and found[6]["grad_norm"] is None
    assert found[12]["train_loss"] < found[3]["train_loss"] and found[12]["data_offset"] == 0
    skipped = "step 6 is skipped, it changes no weights: its loss is nan; 1 of 5 consecutive skips (recovery.skips)"
    assert skipped in said
    assert (tmp_path / "loss.png").exists()


def test_a_skipped_step_updates_no_expert_bias(
    single_rank: None, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[tuple[bool, float]] = []

    def finish(model: torch.nn.Module, applied: bool) -> None:
        before = [router.expert_bias.clone() for _, _, router in routers(model)]
        plain(model, applied)
        after = [router.expert_bias for _, _, router in routers(model)]
        assert all(router.local_tokens_per_expert.sum() == 0 for _, _, router in routers(model))
        moved.append((applied, float((torch.stack(after) - torch.stack(before)).abs().max())))

    plain = loop.update_router_state
    monkeypatch.setattr(loop, "update_router_state", finish)
    config = small(prepared, tmp_path, steps=3)
    object.__setattr__(config.moe, "score_function", "sigmoid")
    object.__setattr__(config.moe, "expert_bias", True)
    with planted({1: NAN}):
        attempt(config)
    assert [applied for applied, _ in moved] == [True, False, True]
    assert moved[0][1] > 0 and moved[1][1] == 0 and moved[2][1] > 0


@pytest.fixture(scope="module")
def rollbacks(megatron_groups: None, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that rolls back once, and goes on to its end."""
    folder = tmp_path_factory.mktemp("rolled-back")
    with planted(TWICE):
        attempt(small(prepared, folder, POLICY))
    return folder


def test_a_run_rolls_back_and_goes_past_the_data(rollbacks: Path, prepared: Path, tmp_path: Path) -> None:
    """To the bit the run whose data never had what was passed over."""
    plain = StepBatches.for_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepBatches, "for_step", lambda self, step: plain(self, step if step < 4 else step + 3))
        attempt(small(prepared, tmp_path))
    found = lines(rollbacks)
    assert [line["step"] for line in found] == list(range(13)), "no line of what was undone"
    assert losses(rollbacks) == losses(tmp_path)
    assert found[-1]["valid_loss"] == lines(tmp_path)[-1]["valid_loss"]
    assert [line["data_offset"] for line in found[1:]] == [0] * 4 + [3] * 8
    assert [line["rollbacks"] for line in found[1:]] == [0] * 4 + [1] * 8
    assert {line["skipped_steps"] for line in found[1:]} == {0}
    (event,) = json.loads((rollbacks / "run.json").read_text())["rollbacks"]
    assert event == {"from_step": 7, "to_step": 4, "samples": [32, 55], "losses": [None, None]}


@pytest.mark.slow
@pytest.mark.parametrize("step", [5, 7, 8, 10], ids="killed before step {}".format)
def test_killed_after_a_roll_back_it_goes_on_as_if_nothing_had_been(
    single_rank: None, step: int, rollbacks: Path, prepared: Path, tmp_path: Path
) -> None:
    """Before the next checkpoint, so that the same roll-back happens again, and after it (step 8)."""
    config = small(prepared, tmp_path, POLICY)
    with planted(TWICE):
        with pytest.raises(Killed):
            attempt(config, killed_before(step))
        attempt(config)
    for expected, found in zip(lines(rollbacks), lines(tmp_path), strict=True):
        for name in (
            "step",
            "tokens",
            "train_loss",
            "grad_norm",
            "valid_loss",
            "skipped_steps",
            "rollbacks",
            "data_offset",
        ):
            assert found.get(name) == expected.get(name), (found["step"], name)


def test_asked_during_a_step_it_stops_after_that_step(
    single_rank: None, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    plain = evaluation.masked_loss_sum

    def masked_loss_sum(*args: Any) -> torch.Tensor:
        if steps[-1:] == [3]:
            signal.raise_signal(signal.SIGTERM)
        return plain(*args)

    monkeypatch.setattr(evaluation, "masked_loss_sum", masked_loss_sum)
    with pytest.raises(StoppedOnRequest, match="after step 3"):
        attempt(small(prepared, tmp_path), lambda _run, step: steps.append(step))
    assert steps == [1, 2, 3] and checkpoints(tmp_path)[-1] == 3


@pytest.mark.slow
def test_stopped_in_the_midst_of_bad_steps_it_counts_on(
    single_rank: None, rollbacks: Path, prepared: Path, tmp_path: Path
) -> None:
    """A checkpoint between two steps that are left out: one more in a row, and it is not rolled back to."""

    def ask(_run: Pretraining, step: int) -> None:
        if step == 6:
            signal.raise_signal(signal.SIGTERM)

    config = small(prepared, tmp_path, POLICY)
    with planted(TWICE):
        with pytest.raises(StoppedOnRequest, match="after step 6"):
            attempt(config, ask)
        assert checkpoints(tmp_path) == [4, 6]
        attempt(config)
    assert losses(tmp_path) == losses(rollbacks) and checkpoints(tmp_path) == [8, 12]


@pytest.mark.slow
def test_stopped_in_the_step_that_rolls_back_it_goes_on_behind_the_data(
    single_rank: None, rollbacks: Path, prepared: Path, tmp_path: Path
) -> None:
    def ask(_run: Pretraining, step: int) -> None:
        if step == 7:
            signal.raise_signal(signal.SIGTERM)

    config = small(prepared, tmp_path, POLICY)
    with planted(TWICE), pytest.raises(StoppedOnRequest, match="after step 4"):
        attempt(config, ask)
    attempt(config)  # nothing is planted any more: it must not meet that data again
    assert losses(tmp_path) == losses(rollbacks)


@pytest.mark.slow
def test_after_as_many_roll_backs_as_are_allowed_a_run_gives_up(
    single_rank: None, prepared: Path, tmp_path: Path
) -> None:
    """Starting it again does not help, until a person allows more."""
    everything = dict.fromkeys(range(8, 20), NAN)
    for _ in range(2):
        with planted(everything), pytest.raises(recovery.Diverged) as caught:
            attempt(small(prepared, tmp_path, {"skips": 3, "rollbacks": 1}))
        assert str(caught.value) == (
            "steps 9 to 11 were skipped, their losses were not finite, not finite, not finite; the run has used all "
            "its rollbacks (recovery.rollbacks is 1): try a lower optimizer.lr in a new output (training.warm_start "
            "can load the weights of this run), or a larger recovery.rollbacks, which skips more data"
        )
        assert checkpoints(tmp_path) == [4, 8]
    with planted(everything):
        attempt(small(prepared, tmp_path, {"skips": 3, "rollbacks": 4}))
    assert [line["data_offset"] for line in lines(tmp_path)[8:]] == [0, 12, 12, 12, 12]


@pytest.mark.slow
def test_the_count_of_roll_backs_outlives_checkpoints_and_restarts(
    single_rank: None, prepared: Path, tmp_path: Path
) -> None:
    """One roll-back, a checkpoint, a kill, a second roll-back: more than the one that is allowed."""
    config = small(prepared, tmp_path, {"skips": 2, "rollbacks": 1})
    with planted(TWICE | {12: NAN, 13: NAN}):
        with pytest.raises(Killed):
            attempt(config, killed_before(9))
        with pytest.raises(recovery.Diverged, match=r"recovery\.rollbacks is 1"):
            attempt(config)


def test_without_a_checkpoint_there_is_nothing_to_roll_back_to(
    single_rank: None, prepared: Path, tmp_path: Path
) -> None:
    with (
        planted(dict.fromkeys(range(1, 20), NAN)),
        pytest.raises(recovery.Diverged, match="there is no older checkpoint: try a"),
    ):
        attempt(small(prepared, tmp_path, {"skips": 3}))


@pytest.mark.slow
def test_an_exploding_loss_is_left_out_where_a_factor_is_given(
    single_rank: None, prepared: Path, tmp_path: Path, said: list[str]
) -> None:
    large = {5: 100.0}
    folders = {factor: tmp_path / str(factor) for factor in (None, 3.0)}
    for factor, folder in folders.items():
        with planted(large):
            attempt(small(prepared, folder, {"loss_factor": factor}))
    learned, skipped_steps = lines(folders[None]), lines(folders[3.0])
    assert [line["skipped_steps"] for line in learned[1:]] == [0] * 12
    assert [line["skipped_steps"] for line in skipped_steps[1:]] == [0] * 5 + [1] * 7
    assert skipped_steps[6]["train_loss"] == learned[6]["train_loss"] > 50 and skipped_steps[6]["grad_norm"] is None
    assert losses(folders[3.0])[5] == losses(folders[None])[5], "the watch changes no bit of what is learned"
    assert sum("(recovery.loss_factor); 1 of 5" in line for line in said) == 1


def test_a_state_without_a_position_is_one_line() -> None:
    state = asdict(TrainState(step=3, tokens=9))
    assert TrainState.of({**state, "tokenizer": "T"}) == TrainState(step=3, tokens=9)
    del state["data_offset"]
    with pytest.raises(ConfigError, match=r"is incomplete: data_offset is missing"):
        TrainState.of(state)


def test_the_median_is_of_the_newest_steps_that_were_applied() -> None:
    settings, position = RecoverySettings(loss_factor=3.0), TrainState()
    assert recovery.loss_limit(settings, position) is None
    for loss in [*[100.0] * 50, *[2.0] * 26]:
        recovery.record_step(settings, position, loss, applied=True)
    assert recovery.loss_limit(settings, position) == 6.0
    for loss in [50.0] * 60:
        recovery.record_step(settings, position, loss, applied=False)
    assert recovery.loss_limit(settings, position) == 6.0 and len(position.losses) == 50


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("layout", ["expert", "pipeline"])
def test_two_ranks_roll_back_together(layout: str, prepared: Path, tmp_path: Path) -> None:
    """What is planted on one rank alone concerns both; a larger loss is left out, a NaN rolls back."""
    ways = {f"{layout}_model_parallel_size": 2}
    (first, second) = run_ranks(on_a_rank, 2, small(prepared, tmp_path, {**POLICY, "loss_factor": 3.0}), layout, **ways)
    assert first == second
    found = lines(tmp_path)
    assert [line["step"] for line in found] == list(range(13))
    assert [line["skipped_steps"] for line in found[1:]] == [0] * 2 + [1] * 10
    assert [line["data_offset"] for line in found[1:]] == [0] * 4 + [3] * 8
    assert found[12]["train_loss"] < found[1]["train_loss"]


def on_a_rank(config: RunConfig, layout: str) -> list[Any]:
    object.__setattr__(config.parallel, layout, 2)
    if layout == "pipeline":
        object.__setattr__(config.model, "num_layers", 2)
    positions: list[Any] = []
    with planted({2: 100.0, **TWICE}, rank=1):
        attempt(config, lambda run, _: positions.append((run.state.step, run.state.skipped_steps)))
    return positions
