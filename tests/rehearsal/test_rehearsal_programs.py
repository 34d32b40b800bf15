"""Programs on a pretended CUDA device: the losses of the CPU, and a known number of waits of the host per step."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from programs import losses
from rehearse import SKIP, notes, rehearse

pytestmark = [pytest.mark.rehearsal, pytest.mark.run, pytest.mark.thorough, SKIP]
SMALL = [
    "model.vocab_size=null", "model.num_layers=2", "model.hidden_size=64", "model.seq_length=32", "moe.num_experts=8",
    "moe.topk=2", "moe.ffn_hidden_size=32", "training.global_batch=8", "training.micro_batch=4",
    "training.precision=bf16", "training.log_every=1", "training.evaluate_every=1000", "training.save_every=1000",
    "data.validation_samples=8", "logging.tensorboard=false", "parallel.expert=1",
]  # fmt: skip
CASES: dict[str, tuple[int, list[str]]] = {
    "stage 0": (1, ["zero.stage=0", "training.precision=fp32"]),
    "stage 1": (1, []),
    "stage 2": (1, ["zero.stage=2"]),
    "stage 3": (1, ["zero.stage=3"]),
    "offloaded": (1, ["zero.stage=3", "zero.offload_optimizer=true", "zero.offload_parameters=true"]),
    "expert": (2, ["parallel.expert=2"]),
    "chunks": (2, ["parallel.expert=2", "moe.dispatcher=deduplicated", "moe.overlap_chunks=2", "moe.recompute=layer"]),
    "pipeline": (2, ["parallel.pipeline=2"]),
    "tensor": (2, ["parallel.tensor=2"]),
    "context": (2, ["parallel.context=2"]),
}
DISPATCH, FP32_PRODUCTS = "model/exchange.py", "local_backend/expert_mlp.py"
# Our own waits per step by file, beside those of the dispatch and of DeepSpeed: the numbers of a step are read
# at once, and a step that is logged reads its report.
STEP = {"distributed/collectives.py": 1, "model/routing_stats.py": 1}
STAGE_0 = {**STEP, "zero/grad_clip.py": 1}  # whether the norm is finite decides whether the step is applied
DEEPSPEED = {
    "stage 0": 0, "stage 1": 3, "stage 2": 6, "stage 3": 56, "offloaded": 61, "expert": 3, "chunks": 3,
    "pipeline": 3, "tensor": 3, "context": 3,
}  # fmt: skip

Truth = Callable[[str], dict[int, float]]


@pytest.fixture(scope="module")
def weights(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run on the CPU whose weights the others start from: the device draws other random numbers."""
    folder = tmp_path_factory.mktemp("weights") / "run"
    pretrain(prepared, folder, "training.steps=1", on_cpu=True)
    return f"training.warm_start={folder}"


@pytest.fixture(scope="module")
def truth(prepared: Path, weights: str, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """The losses of a case on the CPU; ZeRO's stages share those of stage 1."""

    @cache
    def find(name: str) -> dict[int, float]:
        output = tmp_path_factory.mktemp("truth") / "run"
        ranks, settings = CASES[name]
        pretrain(prepared, output, "training.steps=3", weights, *settings, ranks=ranks, on_cpu=True)
        return losses(output)

    return lambda name: find("stage 1" if name in ("stage 2", "stage 3", "offloaded") else name)


def pretrain(data: Path, output: Path, *settings: str, ranks: int = 1, on_cpu: bool = False) -> dict[str, Any]:
    """A run; returns what it noted, nothing on the CPU."""
    arguments = [f"data.path={data}", f"output={output}", *SMALL, *settings]
    status, out = rehearse(
        "launch/pretrain_coe.py", "configs/quickstart.yaml", *arguments,
        ranks=ranks if ranks > 1 else 0, on_cpu=on_cpu, WAITS=f"{output}.waits",
    )  # fmt: skip
    assert status == 0, out[-3000:]
    return {} if on_cpu else notes(Path(f"{output}.waits"))


def ours(found: Mapping[str, int]) -> dict[str, int]:
    """Waits in our own code by file, without those for sizes of the dispatch and for ends of groups in fp32."""
    files: Counter[str] = Counter()
    for line, count in found.items():
        place = re.search(r"coe_megatron/([\w/]+\.py):\d+ < ", line)
        if place and place[1] not in (DISPATCH, FP32_PRODUCTS):
            files[place[1]] += count
    return dict(files)


def of_deepspeed(found: Mapping[str, int]) -> int:
    return sum(
        count for line, count in found.items() if re.search(r" (deepspeed|runtime/zero)/[\w/]+\.py:\d+ < ", line)
    )


def of_dispatch(found: Mapping[str, int]) -> int:
    return sum(count for line, count in found.items() if DISPATCH in line)


def tiers() -> list[Any]:
    return [pytest.param(name, marks=() if name == "stage 1" else (pytest.mark.slow,)) for name in CASES]


@pytest.mark.parametrize("name", tiers())
def test_pretraining_has_the_cpus_losses_and_no_new_waits(
    name: str, prepared: Path, weights: str, truth: Truth, tmp_path: Path
) -> None:
    ranks, settings = CASES[name]
    found = pretrain(prepared, tmp_path / "run", "training.steps=3", weights, *settings, ranks=ranks)
    assert losses(tmp_path / "run") == pytest.approx(truth(name), rel=1e-4)
    step = found["steps"][-1]
    assert ours(step) == (STAGE_0 if name == "stage 0" else STEP)
    assert of_dispatch(step) == {"expert": 4, "chunks": 8}.get(name, 0), "sizes of 2 layers, 2 iterations, and chunks"
    assert of_deepspeed(step) == DEEPSPEED[name]
    assert ours(found["syncs"])["checkpoint/host_copy.py"] == 1, "a save waits once, however many tensors it has"


@pytest.mark.slow
def test_another_read_in_the_loop_is_noticed(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTAKE", "1")
    found = pretrain(prepared, tmp_path / "run", "training.steps=3")
    assert ours(found["steps"][-1]) == {**STEP, "distributed/collectives.py": 2}


@pytest.mark.slow
def test_a_run_is_resumed_saved_in_the_background_and_profiled(prepared: Path, tmp_path: Path) -> None:
    more = [
        "optimizer.warmup=0",
        "optimizer.decay=constant",
        "training.background_saving=true",
        "training.save_every=2",
    ]
    profile = ["profile.first_step=2", "profile.steps=1", "profile.memory=true"]
    pretrain(prepared, tmp_path / "run", *more, *profile, "training.steps=2")
    pretrain(prepared, tmp_path / "run", *more, "training.steps=4")
    pretrain(prepared, tmp_path / "whole", "optimizer.warmup=0", "optimizer.decay=constant", "training.steps=4")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert any((tmp_path / "run" / "profile").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "layout"), [(0, ""), (2, "--expert 2"), (2, "--pipeline 2")])
def test_the_megatron_example_learns(ranks: int, layout: str) -> None:
    status, out = rehearse("examples/chain_in_megatron.py", *layout.split(), ranks=ranks)
    assert status == 0, out[-3000:]
    found = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", out)]
    assert found[-1] < 0.2 * found[0]
