"""Times forward and backward of one MoE sub-layer: Megatron's own (local spec), ours with the same weights, ours as
CoE-2 with half the experts per token, and the latter by the plain loops of the method's definition (fp32 only).
Without sizes, the default table of shapes.

    python benchmarks/bench_layer.py
    python benchmarks/bench_layer.py --dtype both    # whether bf16 is worth it on this machine
    python benchmarks/bench_layer.py --hidden 256 --ffn 176 --tokens 512 2048

Exit status: 0 done, 1 the layers' outputs differ, 2 a bad argument, 130 interrupted from the keyboard.
"""

import argparse
import os
import sys
from typing import Any, NamedTuple

import bench_options
from bench_options import positive

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.cli.arguments import Parser, write_out
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.closed_forms import ModelShape
from coe_megatron.lean_imports import import_megatron


class Sizes(NamedTuple):
    """One row of the table; the shared expert is as wide as a routed one unless --shared-ffn is given."""

    hidden: int
    ffn: int
    experts: int
    topk: int
    tokens: int


TABLE = (
    Sizes(hidden=128, ffn=88, experts=64, topk=8, tokens=1024),
    Sizes(hidden=128, ffn=88, experts=64, topk=8, tokens=4096),
    Sizes(hidden=128, ffn=88, experts=64, topk=4, tokens=1024),
    Sizes(hidden=128, ffn=88, experts=16, topk=4, tokens=1024),
    Sizes(hidden=256, ffn=176, experts=64, topk=8, tokens=1024),
    Sizes(hidden=1024, ffn=704, experts=64, topk=8, tokens=512),
)
SIZES = {
    "hidden": "hidden size",
    "ffn": "width of an expert",
    "experts": "routed experts",
    "topk": "experts per token, even",
}


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print; returns the exit status."""
    parser = bench_options.parser("bench_layer.py", __doc__)
    for (name, text), default in zip(SIZES.items(), TABLE[0], strict=False):
        parser.add_argument(f"--{name}", type=positive, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument(
        "--shared-ffn", type=int, metavar="N", help="width of the shared expert, 0 for none (default: --ffn)"
    )
    parser.add_argument("--tokens", type=positive, nargs="+", metavar="N", help=f"(default: {TABLE[0].tokens})")
    parser.add_argument("--repeats", type=positive, default=20, metavar="N", help="rounds per shape (default: 20)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "both"), default="fp32")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    return bench_options.run(parser, measure, arguments)


def _shapes(options: argparse.Namespace) -> list[ModelShape]:
    """The given sizes with each number of tokens, or the table if no size is given."""
    given = {name: value for name in SIZES if (value := getattr(options, name)) is not None}
    if not given and options.tokens is None and options.shared_ffn is None:
        return [sized(sizes, sizes.ffn) for sizes in TABLE]
    sizes = TABLE[0]._replace(**given)
    shared_ffn = sizes.ffn if options.shared_ffn is None else options.shared_ffn
    return [sized(sizes._replace(tokens=tokens), shared_ffn) for tokens in options.tokens or [sizes.tokens]]


def sized(sizes: Sizes, shared_ffn: int) -> ModelShape:
    """The shape of one layer of these sizes."""
    if sizes.topk % 2:
        raise ConfigError(f"topk is {sizes.topk}: it must be even, since CoE-2 uses half of it in each iteration")
    if shared_ffn < 0:
        raise ConfigError(f"shared_ffn is {shared_ffn}: it must be at least 0")
    return ModelShape(
        layers=1,
        vocab=1,
        heads=1,
        hidden=sizes.hidden,
        seq_length=sizes.tokens,
        experts=sizes.experts,
        topk=sizes.topk,
        expert_ffn=sizes.ffn,
        shared_ffn=shared_ffn,
        chain=ChainSettings(iterations=1),
    )


def measure(options: argparse.Namespace, parser: Parser) -> int:
    try:
        shapes = _shapes(options)
    except ConfigError as error:
        parser.error(str(error).removeprefix("shape."))
    # Makes torch use huge pages on CPU: each step allocates gradients of experts, which are large tensors, and with
    # small pages the kernel takes up to a quarter of the time to provide them.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Imported here, since these imports take seconds and a mistake in the arguments should be reported immediately.
    from coe_megatron.training.console import quiet_libraries

    quiet_libraries()
    import_megatron()
    import layer_times
    import torch

    if options.clock == "cpu" and torch.cuda.is_available():
        parser.error("--clock is cpu: it does not measure a CUDA device, use wall")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        results = _time_layers(options, shapes)
    except layer_times.LayersDifferError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    chosen = {name: getattr(options, name) for name in ("dtype", "clock", "repeats")}
    measured = {**layer_times.machine(), "THP_MEM_ALLOC_ENABLE": os.environ["THP_MEM_ALLOC_ENABLE"], **chosen}
    conditions = ", ".join(f"{name} {value}" for name, value in measured.items())
    write_out(f"forward and backward of one MoE sub-layer; {conditions}")
    write_out("ratios from minima/medians; speed-up: stock over ours; CoE/MoE: CoE-2(K/2) over MoE(K), both ours")
    write_out(layer_times.table(results))
    if options.dtype == "both":
        write_out(f"\n{layer_times.dtypes_table(results)}")
    bench_options.write(options.json, {"machine": measured, "results": [result.as_dict() for result in results]})
    return 0


def _time_layers(options: argparse.Namespace, shapes: list[ModelShape]) -> list[Any]:
    import layer_times

    from coe_megatron.training.progress import Progress

    progress = Progress(0, len(shapes) * options.repeats, visible=True)

    def on_round(rounds: int, finished: ModelShape | None) -> None:
        shown = ("hidden", "expert_ffn", "experts", "topk", "seq_length")
        progress.step(rounds, {name: getattr(finished, name) for name in shown} if finished else None)

    dtypes = [dtype for name, dtype in layer_times.DTYPES.items() if options.dtype in (name, "both")]
    try:
        return layer_times.benchmark_layers(
            shapes, repeats=options.repeats, dtypes=dtypes, clock=options.clock, on_round=on_round
        )
    finally:
        progress.close()


if __name__ == "__main__":
    sys.exit(main())
