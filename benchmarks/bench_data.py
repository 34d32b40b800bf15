"""Times each phase of a preparation on one core; without --input, of the built-in corpus.

read    decompress and cut into lines, or generate the built-in corpus
parse   JSON and template
encode  text to token ids, as in a preparation
write   chunks to disk, then join them to Megatron's indexed datasets
plain   SentencePiece's own encoding of the same text, for comparison with encode; not part of a preparation
total   read, parse, encode and write

    python benchmarks/bench_data.py
    python benchmarks/bench_data.py --input wiki.jsonl.xz --vocab-size 16384

Exit status: 0 done, 1 the data cannot be prepared, 2 a bad argument, 130 interrupted from the keyboard.
"""

import argparse
import sys
from pathlib import Path

import bench_options
from bench_options import positive

from coe_megatron.cli.arguments import Parser, write_out
from coe_megatron.data.options import add_document_options, templates
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.files import user_path
from coe_megatron.lean_imports import import_megatron


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print; returns the exit status."""
    parser = bench_options.parser("bench_data.py", __doc__)
    parser.add_argument(
        "--input", type=user_path, nargs="+", default=[], metavar="FILE", help="(default: built-in corpus)"
    )
    add_document_options(parser)
    parser.add_argument("--vocab-size", type=positive, default=4096, metavar="N", help="(default: 4096)")
    parser.add_argument(
        "--tokenizer", type=user_path, metavar="MODEL", help="a SentencePiece model instead of a new one"
    )
    return bench_options.run(parser, measure, arguments)


def measure(options: argparse.Namespace, parser: Parser) -> int:
    from coe_megatron.data.prepare_settings import PrepareSettings

    source = {"inputs": tuple(options.input)} if options.input else {"builtin": 20_000}
    vocabulary = {"tokenizer": options.tokenizer} if options.tokenizer else {"vocab_size": options.vocab_size}
    try:
        settings = PrepareSettings(Path(), **source, **vocabulary, template=templates(options))
    except ConfigError as error:
        parser.error(str(error))
    from phase_times import time_preparation

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
    bench_options.write(options.json, {"clock": options.clock, **times.as_dict()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
