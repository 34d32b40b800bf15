"""Inspects, verifies, reshards and averages checkpoints, in one process without a GPU or a model."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from coe_megatron.cli.arguments import Parser, program_name, write_out
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.files import require_folder, require_writable, user_path

EPILOG = """examples:
  %(prog)s inspect runs/quickstart
  %(prog)s verify runs/quickstart/checkpoints/step-00000400
  %(prog)s reshard runs/big published --weights-only
  %(prog)s average runs/big averaged --last 4

DIR is a checkpoint, or the folder of a run: its most recent checkpoint (reshard, average: most recent complete one).
The result is a checkpoint too. A run can start from it with training.warm_start, or resume from it if it is among the
run's checkpoints and has optimizer states.

exit status: 0 done, 1 verify found a damaged checkpoint, 2 invalid arguments or an impossible operation (one line on
stderr, nothing written), 130 interrupted."""

COMMANDS = {
    "inspect": "Describe a checkpoint, without verifying its files.",
    "verify": "Read every byte of a checkpoint, or of all checkpoints of a run.",
    "reshard": "Rewrite a checkpoint: in few files instead of one per rank, or without AdamW's moments. Loading never "
    "needs this: any layout and ZeRO stage can load the checkpoints of any other.",
    "average": "Average the weights of several checkpoints, as the start of another run.",
}


def make_parser() -> Parser:
    parser = Parser(prog=program_name("coe-checkpoint", "checkpoint.py"), description=__doc__, epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="inspect|verify|reshard|average")
    parsers = {name: commands.add_parser(name, help=about, description=about) for name, about in COMMANDS.items()}
    inspect, _, reshard, average = parsers.values()
    for command in parsers.values():
        more: dict[str, Any] = {"nargs": "+"} if command is average else {}
        command.add_argument("sources" if more else "source", type=user_path, metavar="DIR", **more)
    inspect.add_argument("--json", action="store_true", help="print one JSON object, with the optimizer's tensors")
    for command in (reshard, average):
        command.add_argument("out", type=user_path, metavar="OUT")
        command.add_argument("--overwrite", action="store_true", help="replace the checkpoint OUT")
    reshard.add_argument("--files", type=int, default=1, metavar="N", help="number of tensor files (default: 1)")
    reshard.add_argument("--weights-only", action="store_true", help="weights and fp32 masters, for a warm start")
    average.add_argument("--last", type=int, metavar="N", help="DIR is a run: average its most recent N checkpoints")
    return parser


def check(options: argparse.Namespace) -> None:
    """Check the options as far as possible without torch.

    Raises:
        ConfigError: one is invalid.
    """
    sources = [options.source] if "source" in options else options.sources
    for source in sources:
        require_folder(source, "DIR")
    if "out" in options:
        require_writable(options.out, "OUT", "folder")
        if options.out.exists() and not options.overwrite:
            raise ConfigError(f"{options.out} exists: name another folder, or give --overwrite")
    if getattr(options, "files", 1) < 1:
        raise ConfigError(f"--files is {options.files}: it must be at least 1")
    if getattr(options, "last", None) is not None and (options.last < 2 or len(sources) > 1):
        raise ConfigError(f"--last is {options.last}: it must be at least 2, with a single run as DIR")


def run_command(options: argparse.Namespace) -> int:
    """Run the chosen command; returns the exit status."""
    from coe_megatron.checkpoint import tools  # torch takes seconds

    match options.command:
        case "inspect":
            contents = tools.inspect(options.source)
            write_out(json.dumps(contents.as_dict(), indent=2) if options.json else contents.table())
        case "verify":
            return verify(options.source)
        case "reshard":
            written = tools.reshard(
                options.source, options.out, options.files, options.weights_only, overwrite=options.overwrite
            )
            write_out(one_line(f"written: {written}"))
        case "average":
            sources = options.sources
            if options.last is not None:
                sources = tools.latest(sources[0], options.last)
            written = tools.average(sources, options.out, options.overwrite)
            write_out(one_line(f"written: {written}"))
    return 0


def verify(source: Path) -> int:
    from coe_megatron.checkpoint import listing, tools

    damaged = False
    for checkpoint, problem in tools.verify(source):
        damaged |= problem is not None and listing.finished(checkpoint)
        write_out(one_line(f"{checkpoint}: {problem or 'complete'}"))
    return 1 if damaged else 0


def main() -> int:
    parser = make_parser()
    options = parser.parse_args()
    try:
        check(options)
        return run_command(options)
    except (ConfigError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; nothing was written\n")


if __name__ == "__main__":
    sys.exit(main())
