"""Benchmarks of this project's parts against Megatron's own, on this machine.

    python launch/benchmark.py layer                                    the default table of shapes
    python launch/benchmark.py layer --hidden 256 --ffn 176 --tokens 512 2048
    python launch/benchmark.py data                                     the built-in corpus
    python launch/benchmark.py data --input wiki.jsonl.xz --vocab-size 16384

Each has a --help of its own. Exit status: 0 done, 1 the layers' outputs differ or the data cannot be prepared, 2 a bad
argument, 130 interrupted from the keyboard.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from coe_megatron import scratch
from coe_megatron.chain.settings import ChainSettings
from coe_megatron.config.arguments import Parser, write_out
from coe_megatron.data.options import add_document_options, templates
from coe_megatron.distributed.environment import whole_number
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.estimate.closed_forms import ModelShape
from coe_megatron.files import problem, require_folder, require_replaceable, user_path, write_atomically
from coe_megatron.lean_imports import import_megatron

LAYER = """Times forward and backward of one MoE sub-layer: Megatron's own (local spec), ours with the same weights, and
ours as CoE-2 with half the experts a token. Without sizes, the default table of shapes.
"""
DATA = """Times each phase of a preparation on one core. Without --input, of the built-in corpus.

read    decompress and cut into lines, or generate the built-in corpus
parse   JSON and template
encode  text to token ids, as a preparation does it
write   chunks to the disk, and joined as Megatron's indexed datasets
plain   SentencePiece's own encoding of the same text, for comparison with encode; no part of a preparation
whole   read, parse, encode and write together
"""


class Sizes(NamedTuple):
    """One row of the table; the shared expert is as wide as a routed one unless another width is asked for."""

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
_LARGEST = 1 << 31
SIZES = {
    "hidden": "hidden size",
    "ffn": "width of an expert",
    "experts": "routed experts",
    "topk": "experts a token, even",
}


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.json is not None:
            require_folder(options.json.parent, "the folder of --json")
            require_replaceable(options.json, "--json")
        scratch.enter()
    except ConfigError as error:
        parser.error(str(error))
    try:
        return options.measure(options, parser)
    except ConfigError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> Parser:
    parser = Parser(prog="benchmark.py", description=__doc__)
    kinds = parser.add_subparsers(required=True, metavar="layer|data")
    for name, about, add, measure in (("layer", LAYER, _add_layer, _layer), ("data", DATA, _add_data, _data)):
        kind = kinds.add_parser(name, description=about)
        kind.prog = f"{parser.prog} {name}"
        add(kind)
        kind.add_argument(
            "--clock", choices=("wall", "cpu"), default="wall", help="cpu: this process's CPU time, for busy machines"
        )
        kind.add_argument("--json", type=user_path, metavar="FILE", help="write what was measured here as well")
        kind.set_defaults(measure=measure)
    return parser


def _add_layer(layer: argparse.ArgumentParser) -> None:
    for (name, text), default in zip(SIZES.items(), TABLE[0], strict=False):
        layer.add_argument(f"--{name}", type=_positive, metavar="N", help=f"{text} (default: {default})")
    layer.add_argument("--shared-ffn", type=int, metavar="N", help="width of the shared expert, 0 for none (ffn)")
    layer.add_argument("--tokens", type=_positive, nargs="+", metavar="N", help=f"(default: {TABLE[0].tokens})")
    layer.add_argument("--repeats", type=_positive, default=20, metavar="N", help="rounds of a shape (default: 20)")
    layer.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    layer.add_argument("--threads", type=_positive, metavar="N", help="threads of the CPU (default: torch's)")


def _add_data(data: argparse.ArgumentParser) -> None:
    data.add_argument(
        "--input", type=user_path, nargs="+", default=[], metavar="FILE", help="(default: built-in corpus)"
    )
    add_document_options(data)
    data.add_argument("--vocab-size", type=_positive, default=4096, metavar="N", help="(default: 4096)")
    data.add_argument("--tokenizer", type=user_path, metavar="MODEL", help="a SentencePiece model instead of a new one")


def _positive(text: str) -> int:
    try:
        return whole_number("the value", text, 1, _LARGEST)
    except ConfigError:
        raise argparse.ArgumentTypeError(f"{text[:50]!r} is not an integer from 1 to {_LARGEST}") from None


def _shapes(options: argparse.Namespace) -> list[ModelShape]:
    """The sizes asked for with each number of tokens, or the table where none is asked for."""
    asked = {name: value for name in SIZES if (value := getattr(options, name)) is not None}
    if not asked and options.tokens is None and options.shared_ffn is None:
        return [_shape(sizes, sizes.ffn) for sizes in TABLE]
    sizes = TABLE[0]._replace(**asked)
    shared_ffn = sizes.ffn if options.shared_ffn is None else options.shared_ffn
    return [_shape(sizes._replace(tokens=tokens), shared_ffn) for tokens in options.tokens or [sizes.tokens]]


def _shape(sizes: Sizes, shared_ffn: int) -> ModelShape:
    if sizes.topk % 2:
        raise ValueError(f"topk is {sizes.topk}: it must be even, for CoE-2 takes half of it in each iteration")
    if shared_ffn < 0:
        raise ValueError(f"shared_ffn is {shared_ffn}: it must be at least 0")
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


def _layer(options: argparse.Namespace, parser: Parser) -> int:
    try:
        shapes = _shapes(options)
    except ConfigError as error:
        parser.error(str(error).removeprefix("shape."))
    # torch on CPU takes memory in huge pages if asked: an expert's gradients are large tensors made anew in each step,
    # and with small pages the kernel needs up to a quarter of the time to hand them out.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Imported here: the stack takes seconds, and a mistake in the arguments should not.
    from coe_megatron.training.console import quiet_libraries

    quiet_libraries()
    import_megatron()
    import torch

    from coe_megatron.training import benchmark

    if options.clock == "cpu" and torch.cuda.is_available():
        parser.error("--clock is cpu: it does not see what a CUDA device does, use wall")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        results = _time_layers(options, shapes)
    except benchmark.LayersDifferError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    asked = {name: getattr(options, name) for name in ("dtype", "clock", "repeats")}
    measured = {**benchmark.machine(), "THP_MEM_ALLOC_ENABLE": os.environ["THP_MEM_ALLOC_ENABLE"], **asked}
    said = ", ".join(f"{name} {value}" for name, value in measured.items())
    write_out(f"forward and backward of one MoE sub-layer; {said}")
    write_out("ratios from minima/medians; speed-up: stock over ours; CoE/MoE: CoE-2(K/2) over MoE(K), both ours")
    write_out(benchmark.table(results))
    _write(options.json, {"machine": measured, "results": [result.as_dict() for result in results]})
    return 0


def _time_layers(options: argparse.Namespace, shapes: list[ModelShape]) -> list[Any]:
    from coe_megatron.training import benchmark
    from coe_megatron.training.progress import Progress

    progress = Progress(0, len(shapes) * options.repeats, visible=True)

    def on_round(rounds: int, finished: ModelShape | None) -> None:
        shown = ("hidden", "expert_ffn", "experts", "topk", "seq_length")
        progress.step(rounds, {name: getattr(finished, name) for name in shown} if finished else None)

    dtype = benchmark.DTYPES[options.dtype]
    try:
        return benchmark.benchmark_layers(
            shapes, repeats=options.repeats, dtype=dtype, clock=options.clock, on_round=on_round
        )
    finally:
        progress.close()


def _data(options: argparse.Namespace, parser: Parser) -> int:
    from coe_megatron.data.prepare import PrepareSettings

    source = {"inputs": tuple(options.input)} if options.input else {"builtin": 20_000}
    vocabulary = {"tokenizer": options.tokenizer} if options.tokenizer else {"vocab_size": options.vocab_size}
    try:
        settings = PrepareSettings(Path(), **source, **vocabulary, template=templates(options))
    except ConfigError as error:
        parser.error(str(error))
    from coe_megatron.data.benchmark import time_preparation
    from coe_megatron.data.records import InputError
    from coe_megatron.training.console import quiet_libraries

    quiet_libraries()
    import_megatron()
    try:
        settings.check_inputs()
        times = time_preparation(settings, clock=options.clock, progress=True)
    except ConfigError as error:
        parser.error(str(error))
    except (InputError, OSError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 1
    write_out(f"one process, {options.clock} time\n{times.table()}")
    _write(options.json, {"clock": options.clock, **times.as_dict()})
    return 0


def _write(path: Path | None, document: dict[str, Any]) -> None:
    if path is not None:
        try:
            write_atomically(path, json.dumps(document, indent=1) + "\n")
        except OSError as error:
            raise problem(path, "--json", error) from None


if __name__ == "__main__":
    sys.exit(main())
