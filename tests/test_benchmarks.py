"""The programs of benchmarks/: what they write and refuse; layers that compute different things are not timed."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import bench_prediction
import layer_times
import published_runs
import pytest
import torch
from attempt_log import Attempt, Constants, Log, Losses
from bench_goodput import compared, failing, kills
from machine_times import Call, fitted
from programs import ROOT, python

from coe_megatron import scratch
from coe_megatron.chain.settings import ChainSettings
from coe_megatron.estimate.closed_forms import ModelShape
from coe_megatron.estimate.machine import machine
from coe_megatron.local_backend.expert_activation import SwiGLU
from coe_megatron.local_backend.expert_mlp import Assignment, ExpertMLP, WeightGradients

SHAPE = ModelShape(
    layers=1,
    vocab=1,
    heads=1,
    hidden=16,
    expert_ffn=8,
    shared_ffn=8,
    experts=8,
    topk=4,
    seq_length=32,
    chain=ChainSettings(iterations=1),
)
# Of W1, W2, tokens and gates: two experts, 4 wide states, 8 wide inside.
SIZES = ((2, 16, 4), (2, 4, 8), (5, 4), (5, 1))


@pytest.mark.slow
@pytest.mark.run
def test_a_tiny_shape_from_start_to_end(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    sizes = ("--hidden", 16, "--ffn", 8, "--experts", 8, "--topk", 4, "--tokens", 32, 48)
    done = python("benchmarks/bench_layer.py", *sizes, "--repeats", 3, "--threads", 1, "--json", file)
    assert done.returncode == 0, done.stderr
    assert "step 6/6" in done.stderr and "Traceback" not in done.stderr
    written = json.loads(file.read_text())
    assert written["machine"]["threads"] == 1 and written["machine"]["torch"] == torch.__version__
    assert [result["shape"]["tokens"] for result in written["results"]] == [32, 48]
    for result in written["results"]:
        seconds = result["seconds"]
        assert result["outputs_difference"] < 1e-5
        for kind in ("minimum", "median"):
            speed_up = seconds["stock"][kind] / seconds["ours"][kind]
            ratio = seconds["coe"][kind] / seconds["ours"][kind]
            assert result["speed_up"][kind] == pytest.approx(speed_up) and speed_up > 0
            assert result["time_over_flops"][kind] == pytest.approx(ratio / result["flops_ratio"])
        assert f"{result['speed_up']['minimum']:.2f}/{result['speed_up']['median']:.2f}" in done.stdout


@pytest.mark.run
def test_a_preparation_is_timed_phase_by_phase(tmp_path: Path) -> None:
    text, file = tmp_path / "in.jsonl", tmp_path / "times.json"
    documents = [f"{number} apples and {number * 7} pears" for number in range(2000)]
    text.write_text("".join(json.dumps({"story": document}) + "\n" for document in documents))
    options = ("--input", text, "--field", "story", "--vocab-size", 300, "--json", file)
    done = python("benchmarks/bench_data.py", *options)
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text())
    assert written["bytes"] == sum(len(document.encode()) for document in documents)
    seconds, rates = written["seconds"], written["megabytes_per_second"]
    assert set(seconds) == {"read", "parse", "encode", "plain", "write"} and min(seconds.values()) > 0
    whole = sum(value for name, value in seconds.items() if name != "plain")
    assert rates["total"] == pytest.approx(written["bytes"] / 1e6 / whole)
    assert written["encode_speedup"] == pytest.approx(seconds["plain"] / seconds["encode"])
    assert f"{written['encode_speedup']:.2f}" in done.stdout


@pytest.mark.parametrize(
    ("kind", "explained"),
    [
        ("layer", "CoE-2 with half the experts"),
        ("data", "plain   SentencePiece's own encoding"),
        ("dispatch", "Hosts are network namespaces of this machine"),
        ("machine", "Measures this node and its links in about two minutes"),
        ("prediction", "Holds predicted times of steps against measured ones"),
        ("goodput", "Holds the predicted goodput of runs that are killed at random"),
    ],
)
def test_each_benchmark_explains_itself(kind: str, explained: str) -> None:
    done = python(f"benchmarks/bench_{kind}.py", "--help")
    assert done.stdout.startswith(f"usage: bench_{kind}.py ") and done.stdout.count(explained) == 1


@pytest.mark.parametrize(
    ("kind", "arguments", "says"),
    [
        ("data", ("--input", "none.jsonl"), "--input is none.jsonl: there is no such file"),
        ("data", ("--vocab-size", "12"), "--vocab-size is 12: it must be at least 261"),
        ("dispatch", ("--variant", "moe.dispatch=alltoall"), "moe.dispatch is not a setting"),
        ("dispatch", ("--variant", "", "--variant", "parallel.expert=1"), "--variant changes parallel"),
        ("dispatch", ("--expert", "3"), "parallel.expert is 3"),
        ("dispatch", ("--delay-ms", "-1"), "argument --delay-ms: '-1' is not a number from 0 to 1000000"),
        ("machine", ("x.yaml", "--base", "x100"), "--base x100: it must be a machine file, or one of a100"),
        ("machine", ("x.yaml", "--ranks", "0"), "argument --ranks: '0' is not an integer from 1"),
        ("machine", ("/dev/null/x.yaml",), "FILE is /dev/null/x.yaml: "),
        ("prediction", ("--only", "mars"), "--only: no place has 'mars' in its name: 1 host, 1 rank; "),
        ("goodput", ("--only", "mars"), "--only: no run has 'mars' in its name: foreground; background; "),
        ("goodput", ("--between", "0"), "argument --between: '0' is not an integer from 1"),
        ("layer", ("--topk", "3"), "topk is 3: it must be even"),
        ("layer", ("--experts", "4", "--topk", "8"), "topk is 8: it must be at most experts, 4"),
        ("layer", ("--hidden", "0"), "argument --hidden: '0' is not an integer from 1 to 2147483648"),
        ("layer", ("--json", "nowhere/times.json"), "the folder of --json is nowhere: there is no such folder"),
    ],
)
def test_a_bad_argument_is_one_line(kind: str, arguments: tuple[str, ...], says: str) -> None:
    done = python(f"benchmarks/bench_{kind}.py", *arguments)
    assert done.returncode == 2
    assert says in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("ways", [(2e-4, 3e-5, 1e9), (1e-3, 0.0, 5e7)])
def test_a_way_is_what_its_calls_take(ways: tuple[float, float, float]) -> None:
    start, hop, bandwidth = ways
    sizes = [(size, sent) for size in (2, 4, 8) for sent in (64.0, 1e5, 1e7)]
    calls = [Call(size, sent, start + hop * (size - 2) + sent / bandwidth) for size, sent in sizes]
    assert fitted(calls) == pytest.approx({"start": start, "hop": hop, "bandwidth": bandwidth})
    assert fitted([Call(2, 64.0, start)])["hop"] == 0  # which groups of two cannot tell


@pytest.mark.slow
@pytest.mark.run
def test_this_node_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "node.yaml"
    done = python("benchmarks/bench_machine.py", file, "--base", "h100", "--ranks", 2, seconds=280)
    assert done.returncode == 0, done.stderr
    found = machine(str(file))
    assert found.measured and done.stdout == f"{file}: {found.name}\n" and "Traceback" not in done.stderr
    base = machine("h100")
    assert (found.ranks_per_node, found.device, found.bf16.peak) == (2, "cpu", None)
    assert (found.across, found.failures) == (base.across, base.failures)
    assert found.host.operation > 0 and not found.host.is_asynchronous
    assert found.inside.ring.bandwidth > 1e6 and found.cores == os.cpu_count()
    assert not list(file.parent.glob(".machine-*")) and list(file.parent.iterdir()) == [file]
    links = tmp_path / "links.yaml"
    done = python("benchmarks/bench_machine.py", links, "--base", file, "--links", "--ranks", 4, seconds=280)
    assert done.returncode == 0, done.stderr
    four = machine(str(links))
    assert (four.ranks_per_node, four.host, four.fp32) == (4, found.host, found.fp32) and four.inside != found.inside


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks run in this process, whose folder of temporary files stays."""
    monkeypatch.setattr(scratch, "enter", lambda: None)


@pytest.mark.usefixtures("here")
def test_measured_steps_are_predicted_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loads = [[1 / 8] * 8] * 8
    runs = [
        {"layout": layout, "steps": [seconds, 9.0, seconds], "loads": loads}
        for layout, seconds in {"": 2.0, "parallel.expert=2": 1.0, "moe.topk=4 chain.iterations=1": 0.5}.items()
    ]
    measured = {"machine": asdict(machine("cpu")), "runs": runs, "suggested": "parallel.expert=2"}
    file = tmp_path / "times.json"
    file.write_text(json.dumps({"places": {"1 host, 2 ranks": measured}}))
    assert bench_prediction.main(["--again", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "best: parallel.expert=2\nsuggested: +0.0% (parallel.expert=2)\ndefault: +100.0% (data" in shown
    assert "largest error" in shown and shown.count("2 s") == 1
    file.write_text("{}")
    with pytest.raises(SystemExit) as ended:
        bench_prediction.main(["--again", str(file)])
    assert ended.value.code == 2 and "--again is " in capsys.readouterr().err


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("place", "median", "largest", "order"), [("1 host", 0.1, 0.25, 0.9), ("2 hosts", 0.12, 0.36, 0.9)]
)
def test_kept_measurements_are_predicted(
    place: str, median: float, largest: float, order: float, tmp_path: Path
) -> None:
    file = tmp_path / "again.json"
    kept = ROOT / "benchmarks" / "measured_steps.json"
    assert bench_prediction.main(["--again", str(kept), "--only", place, "--json", str(file)]) == 0
    found = json.loads(file.read_text())["summary"]
    assert found["median error"] <= median and found["largest error"] <= largest
    assert found["correlation of ranks"] >= order


def test_a_machine_without_network_namespaces_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    done = python("benchmarks/bench_dispatch.py")
    assert done.returncode == 1
    assert done.stderr == "error: hosts cannot be made of network namespaces here: no program ip (package iproute2)\n"


def test_arguments_are_checked_before_torch_is_imported() -> None:
    program = "import runpy, sys; sys.argv = ['bench_layer.py', '--topk', '3']; sys.path.insert(0, 'benchmarks')\n"
    program += "try: runpy.run_path('benchmarks/bench_layer.py', run_name='__main__')\n"
    program += "except SystemExit: print('torch' in sys.modules)"
    assert python("-c", program).stdout.strip() == "False"


def test_the_flops_ratio_counts_routers_and_shared_experts_twice() -> None:
    times = layer_times.LayerTimes(SHAPE, torch.float32, *[layer_times.Seconds(1.0, 1.0)] * 4, difference=0.0)
    expert, router = 6 * 16 * 8, 2 * 16 * 8
    assert times.flops_ratio == pytest.approx((4 * expert + 2 * expert + 2 * router) / (5 * expert + router))


def test_layers_are_compared_and_timed(single_rank: None) -> None:
    dtypes = torch.float32, torch.bfloat16
    times, in_bf16 = results = layer_times.time_layers(SHAPE, 1, dtypes, torch.device("cpu"))
    assert times.difference < 1e-5 and in_bf16.difference < 3e-2
    assert 0 < times.ours.minimum == times.ours.median
    assert times.loops is not None and in_bf16.loops is None
    ratio = times.coe.minimum / in_bf16.coe.minimum
    assert layer_times.dtypes_table(results).splitlines()[1].endswith(f"{ratio:.2f}/{ratio:.2f}")


def test_layers_that_differ_are_not_timed(single_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = SwiGLU.forward
    monkeypatch.setattr(SwiGLU, "forward", lambda *args: 1.001 * right(*args))
    with pytest.raises(layer_times.LayersDifferError, match="differ by"):
        layer_times.time_layers(SHAPE, 1, [torch.float32], torch.device("cpu"))


def test_gradients_of_a_chain_are_added_in_place() -> None:
    """Gradients of tokens and weights are no views: adding those takes fresh memory in each iteration."""
    w1, w2, tokens, gates = inputs = [torch.randn(size, requires_grad=True) for size in SIZES]
    mlp, ends = ExpertMLP((w1, w2), SwiGLU(), keeps_activation=True), torch.tensor([3, 5], dtype=torch.int32)
    result = mlp(Assignment(tokens, gates, torch.arange(5), ends), WeightGradients(w1, w2))
    inner = torch.cat([tokens[:3] @ w1[0].T, tokens[3:] @ w1[1].T])
    active = gates * torch.nn.functional.silu(inner[:, :8]) * inner[:, 8:]
    expected = torch.cat([active[:3] @ w2[0].T, active[3:] @ w2[1].T])
    torch.testing.assert_close(result, expected)
    gradient = torch.randn_like(result)
    found = torch.autograd.grad(result, inputs, gradient)
    for each, truth in zip(found, torch.autograd.grad(expected, inputs, gradient), strict=True):
        torch.testing.assert_close(each, truth)
    assert all(each.is_contiguous() and not each._is_view() for each in found[:3])


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("Mixtral 8x22B, 128 GPUs", 141e9, 39e9),
        ("Qwen2-57B-A14B, 64 GPUs", 57.4e9, 14.2e9),
        ("DeepSeek-V3, 2,048 GPUs", 671e9 * 64 / 61, 37e9 * 64 / 61),
    ],
)
def test_published_runs_are_of_the_published_models(name: str, total: float, active: float) -> None:
    run = published_runs.RUNS[name]
    cost = published_runs.predicted(run, run.interleaved[-1])
    assert cost.parameters.total == pytest.approx(total, rel=0.02)
    assert cost.parameters.active == pytest.approx(active, rel=0.03)
    assert cost.layout.world_size == int(name.split()[-2].replace(",", ""))


def _steps(ready: float, first: int, last: int, start: float = 2.0, killed_after: float = 0.4) -> Attempt:
    """Steps of 1 s that begin at `ready`: the first one takes 1.5 s, and those after a save (every 10 steps) 3 s."""
    done, now = [], ready
    for step in range(first + 1, last + 1):
        now += 1.5 if step == first + 1 else 3.0 if step % 10 == 1 else 1.0
        done.append(now)
    return Attempt(ready - start, now + killed_after, ready, first, tuple(done))


def _log(paused: float = 0.0) -> Log:
    """35 steps; killed after step 27, then while it starts from step 20, then not again."""
    first = _steps(102.0, 0, 27)
    stuck = Attempt(first.ended + 1 + paused, first.ended + 2 + paused)
    last = _steps(stuck.ended + 4, 20, 35, start=3.0, killed_after=2.5)
    complete = {10: first.steps[9] + 1.9, 20: first.steps[19] + 1.9, 30: last.steps[9] + 1.9, 35: last.steps[-1] + 2}
    return Log((first, stuck, last), complete, interval=10, background=False, paused=paused)


def test_constants_of_a_run_that_was_killed() -> None:
    found = Constants.of([_log()]).as_dict()
    expected = {"step": 1.0, "median": 1.0, "start": 2.0, "load": 1.0, "warm_up": 0.5, "save": 2.0, "written": 0.0}
    assert found == pytest.approx(expected)


def test_where_a_killed_run_lost_its_time() -> None:
    log = _log()
    found = Losses.of(log, step=1.0)
    down = (2.0 + 0.5) + 1.0 + 1.0 + (1.0 + 3.0 + 0.5)
    saves, repeated = 2 * 3 + 2, 7 + 0.4  # the second save of step 20 does not count, as the run goes on from there
    assert (found.failures, found.before_first_step) == (2, 1)
    assert found.lost == pytest.approx({"saves": saves, "down": down, "repeated": repeated})
    assert found.seconds == pytest.approx(35 + saves + down + repeated)
    assert found.goodput == pytest.approx(35 / found.seconds)
    assert Losses.of(_log(paused=50.0), step=1.0).lost == pytest.approx(found.lost)


def test_a_killed_run_replayed_takes_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    log = _log()
    gaps = [each.ended - each.began for each in log.attempts[:2]]
    monkeypatch.setattr("bench_goodput.kills", lambda *_: iter(gaps))
    found = compared("by hand", log, Constants.of([log]), failing(20.0, 1.0), seed=1)
    for times in ("own", "timed"):
        replayed = found["predicted"][f"replayed, {times} times"]
        assert replayed["error"] == pytest.approx(0, abs=1e-6)
        assert replayed["lost"] | {"slower": 0} == pytest.approx(found["measured"]["lost"] | {"slower": 0})
    assert found["predicted"]["simulated, own times"]["failures"] > 2


def test_a_background_save_counts_when_it_is_written() -> None:
    """Steps during the writing take 0.5 s longer, and the copy 1 s."""
    done, now = [], 10.0
    for step in range(1, 41):
        now += 1.0 + (step > 3) * (1.0 * (step % 10 == 1) + 0.5 * (step % 10 in (1, 2, 3)))
        done.append(now)
    attempt = Attempt(8.0, now + 6, 10.0, 0, tuple(done))
    log = Log((attempt,), {step: done[step - 1] + 5.4 for step in (10, 20, 30, 40)}, interval=10, background=True)
    found = Constants.of([log])
    assert (found.step, found.save, found.written) == pytest.approx((1.0, 2.5, 2.9))


def test_kills_have_the_mean_that_is_asked_for() -> None:
    drawn = kills(1, 20.0)
    assert sum(next(drawn) for _ in range(4000)) / 4000 == pytest.approx(20, rel=0.05)
