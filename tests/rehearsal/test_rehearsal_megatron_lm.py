"""Megatron-LM's own loop with a chain, examples/pretrain_megatron_lm.py, against our program on the same batches."""

import shutil
from pathlib import Path

import pytest
import yaml
from programs import ROOT, losses
from rehearse import SKIP, rehearse
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coe_megatron.checkpoint.names import name_of
from coe_megatron.config.from_megatron import translate

pytest.importorskip("megatron.training", reason="Megatron-Core 0.16.1 has no megatron.training")
from pretrain_megatron_lm import ARGUMENTS

pytestmark = [pytest.mark.rehearsal, pytest.mark.run, pytest.mark.slow, pytest.mark.timeout(900), SKIP]
PROGRAM = ROOT / "tests" / "rehearsal" / "megatron_lm.py"
STEPS, SAVED = 10, 5
LAYOUTS = {"1 rank": (1, []), "expert": (2, ["--expert-model-parallel-size=2"])}
BOUNDS = {"fp32": 2e-6, "bf16": 1e-4}  # of the difference of losses, relative


@pytest.fixture(scope="module")
def weights(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that all others start from: initial weights, also the fp32 masters, that bf16 can hold."""
    run = tmp_path_factory.mktemp("megatron_lm") / "weights"
    ours(prepared, run, "bf16", [], "training.steps=1", "optimizer.lr=1e-30", on_cpu=True)
    return run / "checkpoints" / name_of(1)


def ours(
    data: Path, run: Path, precision: str, flags: list[str], *settings: str, ranks: int = 1, on_cpu: bool = False
) -> dict[int, float]:
    """Losses by step of our program with the settings of the example's command line."""
    config = run.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(translate([*ARGUMENTS.split(), *flags]).nested()))
    more = [f"data.path={data}", f"output={run}", f"training.precision={precision}", "model.vocab_size=null", *settings]
    ranks = ranks if ranks > 1 else 0
    status, out = rehearse("launch/pretrain_coe.py", config, *more, ranks=ranks, on_cpu=on_cpu)
    assert status == 0, out[-3000:]
    return losses(run)


def megatrons(data: Path, run: Path, precision: str, flags: list[str], weights: Path, ranks: int) -> dict[int, float]:
    """Losses by step of Megatron-LM's loop; those in its log are means of two steps in the second after a start."""
    board = run.with_name(f"{run.name}-board")
    more = [f"--save={run}", f"--load={run}", "--eval-iters=0", "--num-workers=0", f"--tensorboard-dir={board}"]
    status, out = rehearse(PROGRAM, data, weights / "tensors", precision, *more, *flags, ranks=ranks, seconds=500)
    assert status == 0, out[-3000:]
    return {event.step: event.value for event in EventAccumulator(str(board)).Reload().Scalars("lm loss")}


def forget(run: Path, step: int) -> None:
    """Make the checkpoint after this step the last one."""
    shutil.rmtree(run / f"iter_{STEPS:07}")
    (run / "latest_checkpointed_iteration.txt").write_text(str(step))


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.full)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatrons_loop_trains_as_our_program(
    layout: str, precision: str, prepared: Path, weights: Path, tmp_path: Path
) -> None:
    ranks, flags = LAYOUTS[layout]
    found = megatrons(prepared, tmp_path / "megatron", precision, flags, weights, ranks)
    expected = ours(prepared, tmp_path / "ours", precision, flags, f"training.warm_start={weights}", ranks=ranks)
    print(*(f"{step:2} {found[step]:.6f} {expected[step]:.6f}" for step in found), sep="\n")
    assert list(found) == list(range(1, STEPS + 1))
    assert found == pytest.approx(expected, rel=BOUNDS[precision])


def test_megatrons_loop_resumes_a_chain(prepared: Path, weights: Path, tmp_path: Path) -> None:
    run = (prepared, tmp_path / "megatron", "bf16", LAYOUTS["expert"][1], weights, 2)
    whole = megatrons(*run)
    forget(tmp_path / "megatron", SAVED)
    (tmp_path / "megatron-board").rename(tmp_path / "first")
    resumed = megatrons(*run)
    assert resumed == {step: loss for step, loss in whole.items() if step > SAVED}
