"""Programs on a pretended CUDA device: the losses of the CPU, and a known number of waits of the host per step."""

import re
from collections import Counter
from pathlib import Path

import pytest
from programs import losses
from rehearse import SKIP, rehearse, waits

pytestmark = [pytest.mark.rehearsal, pytest.mark.run, pytest.mark.thorough, SKIP]
SMALL = [
    "model.vocab_size=null", "model.num_layers=2", "model.hidden_size=64", "model.seq_length=32", "moe.num_experts=8",
    "moe.topk=2", "moe.ffn_hidden_size=32", "training.global_batch=8", "training.micro_batch=4",
    "training.precision=bf16", "training.log_every=1", "training.evaluate_every=1000", "training.save_every=1000",
    "data.validation_samples=8", "logging.tensorboard=false",
]  # fmt: skip
# Our own waits per step by file, beside those of Megatron's dispatcher and of DeepSpeed: the numbers of a step are read
# at once, and logging every step reads its report.
STEP = {"distributed/collectives.py": 1, "model/routing_stats.py": 1}
CASES: dict[str, tuple[int, list[str], dict[str, int]]] = {
    "stage 1": (1, [], STEP),
    "stage 2": (1, ["zero.stage=2"], STEP),
    "stage 3": (1, ["zero.stage=3"], STEP),
    "offloaded": (1, ["zero.stage=3", "zero.offload_optimizer=true", "zero.offload_parameters=true"], STEP),
    "expert": (2, ["parallel.expert=2"], STEP),
    "pipeline": (2, ["parallel.pipeline=2"], STEP),
    "tensor": (2, ["parallel.tensor=2"], STEP),
}
TIERS: dict[str, tuple[pytest.MarkDecorator, ...]] = {"stage 1": (), "expert": (pytest.mark.slow,)}  # others: full


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rehearsed") / "data"
    arguments = ("--builtin", "400", "--vocab-size", "512", "--output", folder)
    status, out = rehearse("launch/prepare_data.py", *arguments, on_cpu=True)
    assert status == 0, out[-2000:]
    return folder


@pytest.fixture(scope="module")
def weights(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the CPU whose weights the others start from: the device draws other random numbers."""
    folder = tmp_path_factory.mktemp("weights") / "run"
    pretrain(data, folder, "training.steps=1", on_cpu=True)
    return folder


def pretrain(data: Path, output: Path, *settings: str, ranks: int = 1, on_cpu: bool = False) -> Counter[str]:
    """A run; returns its waits, none on the CPU."""
    layout = [] if any(each.startswith("parallel.expert=") for each in settings) else ["parallel.expert=1"]
    arguments = [f"data.path={data}", f"output={output}", *SMALL, *layout, *settings]
    status, out = rehearse(
        "launch/pretrain_coe.py", "configs/quickstart.yaml", *arguments,
        ranks=ranks if ranks > 1 else 0, on_cpu=on_cpu, WAITS=f"{output}.waits",
    )  # fmt: skip
    assert status == 0, out[-3000:]
    return Counter() if on_cpu else waits(Path(f"{output}.waits"))


def ours(found: Counter[str]) -> dict[str, int]:
    """Waits in our own code by file, without those for rows of experts."""
    files: Counter[str] = Counter()
    for line, count in found.items():
        place = re.search(r"coe_megatron/([\w/]+\.py):\d+ < ", line)
        if place and place[1] not in ("model/dispatchers.py", "local_backend/experts.py"):
            files[place[1]] += count
    return dict(files)


@pytest.mark.parametrize("name", [pytest.param(name, marks=TIERS.get(name, (pytest.mark.full,))) for name in CASES])
def test_pretraining_has_the_cpus_losses_and_no_new_waits(name: str, data: Path, weights: Path, tmp_path: Path) -> None:
    ranks, settings, expected = CASES[name]
    settings = [*settings, f"training.warm_start={weights}"]
    short = pretrain(data, tmp_path / "short", *settings, "training.steps=3", ranks=ranks)
    long = pretrain(data, tmp_path / "long", *settings, "training.steps=5", ranks=ranks)
    pretrain(data, tmp_path / "cpu", *settings, "training.steps=5", ranks=ranks, on_cpu=True)
    assert losses(tmp_path / "long") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4)
    assert {file: count / 2 for file, count in ours(long - short).items()} == expected


@pytest.mark.full
def test_a_run_is_resumed_saved_in_the_background_and_profiled(data: Path, tmp_path: Path) -> None:
    more = ["training.background_saving=true", "training.save_every=2"]
    profile = ["profile.first_step=2", "profile.steps=1", "profile.memory=true"]
    pretrain(data, tmp_path / "run", *more, *profile, "training.steps=4")
    pretrain(data, tmp_path / "run", *more, "training.steps=6")
    pretrain(data, tmp_path / "whole", "training.steps=6")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert any((tmp_path / "run" / "profile").iterdir())


@pytest.mark.full
@pytest.mark.parametrize(("ranks", "layout"), [(0, ""), (2, "--expert 2"), (2, "--pipeline 2")])
def test_the_megatron_example_learns(ranks: int, layout: str) -> None:
    status, out = rehearse("examples/chain_in_megatron.py", *layout.split(), ranks=ranks)
    assert status == 0, out[-3000:]
    assert "cuda" in out or "loss" in out
