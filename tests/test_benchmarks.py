"""The programs of benchmarks/: what they write and refuse; layers that compute different things are not timed."""

import json
from pathlib import Path

import layer_times
import pytest
import torch
from programs import python

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.estimate.closed_forms import ModelShape
from coe_megatron.local_backend import experts

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
    ("kind", "explained"), [("layer", "CoE-2 with half the experts"), ("data", "plain   SentencePiece's own encoding")]
)
def test_each_benchmark_explains_itself(kind: str, explained: str) -> None:
    done = python(f"benchmarks/bench_{kind}.py", "--help")
    assert done.stdout.startswith(f"usage: bench_{kind}.py ") and done.stdout.count(explained) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--input", "none.jsonl"), "--input is none.jsonl: there is no such file"),
        (("--vocab-size", "12"), "--vocab-size is 12: it must be at least 261"),
    ],
)
def test_a_bad_argument_for_data_is_one_line(arguments: tuple[str, ...], says: str) -> None:
    done = python("benchmarks/bench_data.py", *arguments)
    assert done.returncode == 2
    assert says in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--topk", "3"), "topk is 3: it must be even"),
        (("--experts", "4", "--topk", "8"), "topk is 8: it must be at most experts, 4"),
        (("--hidden", "0"), "argument --hidden: '0' is not an integer from 1 to 2147483648"),
        (("--json", "nowhere/times.json"), "the folder of --json is nowhere: there is no such folder"),
    ],
)
def test_a_bad_argument_is_one_line(arguments: tuple[str, ...], says: str) -> None:
    done = python("benchmarks/bench_layer.py", *arguments)
    assert done.returncode == 2
    assert says in done.stderr and len(done.stderr.splitlines()) == 1


def test_arguments_are_checked_before_torch_is_imported() -> None:
    program = "import runpy, sys; sys.argv = ['bench_layer.py', '--topk', '3']; sys.path.insert(0, 'benchmarks')\n"
    program += "try: runpy.run_path('benchmarks/bench_layer.py', run_name='__main__')\n"
    program += "except SystemExit: print('torch' in sys.modules)"
    assert python("-c", program).stdout.strip() == "False"


def test_the_flops_ratio_counts_routers_and_shared_experts_twice() -> None:
    times = layer_times.LayerTimes(SHAPE, *[layer_times.Seconds(1.0, 1.0)] * 3, difference=0.0)
    expert, router = 6 * 16 * 8, 2 * 16 * 8
    assert times.flops_ratio == pytest.approx((4 * expert + 2 * expert + 2 * router) / (5 * expert + router))


def test_layers_are_compared_and_timed(single_rank: None) -> None:
    times = layer_times.time_layers(SHAPE, 1, torch.float32, torch.device("cpu"))
    assert times.difference < 1e-5
    assert 0 < times.ours.minimum == times.ours.median


def test_layers_that_differ_are_not_timed(single_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = experts.GroupedLinear.forward
    monkeypatch.setattr(experts.GroupedLinear, "forward", staticmethod(lambda *args: 1.001 * right(*args)))
    with pytest.raises(layer_times.LayersDifferError, match="differ by"):
        layer_times.time_layers(SHAPE, 1, torch.float32, torch.device("cpu"))


def test_gradients_of_a_chain_are_added_in_place(single_rank: None) -> None:
    """Gradients of expert weights arrive whole, not as views: adding those takes fresh memory in each iteration."""
    weight = torch.randn(2, 8, 4, requires_grad=True)
    ends = torch.tensor([3, 5], dtype=torch.int32)
    rows = torch.randn(5, 4, requires_grad=True)
    result = experts.GroupedLinear.apply(rows, weight, ends)
    expected = torch.cat([rows[:3] @ weight[0].T, rows[3:] @ weight[1].T])
    torch.testing.assert_close(result, expected)
    gradient = torch.randn_like(result)
    of_rows, of_weight = torch.autograd.grad(result, (rows, weight), gradient)
    for found, truth in zip((of_rows, of_weight), torch.autograd.grad(expected, (rows, weight), gradient), strict=True):
        torch.testing.assert_close(found, truth)
    assert of_weight.is_contiguous() and not of_weight._is_view()
