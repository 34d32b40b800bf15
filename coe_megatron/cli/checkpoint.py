"""Inspects, verifies, rewrites, upcycles, exports and imports checkpoints, in one process without a GPU or a model."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from coe_megatron.cli.arguments import Parser, program_name, write_out
from coe_megatron.convert.upcycle_plan import CONFIG, Upcycling, find_config, plan
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.files import require_file, require_folder, require_writable, user_path

EPILOG = """examples:
  %(prog)s inspect runs/quickstart
  %(prog)s verify runs/quickstart/checkpoints/step-00000400
  %(prog)s reshard runs/big published --weights-only
  %(prog)s average runs/big averaged --last 4
  %(prog)s upcycle runs/moe chain --iterations 2 --routers roll --set chain.residual=init
  %(prog)s export runs/quickstart exported
  %(prog)s import Mixtral-8x7B-v0.1 runs/mixtral

DIR is a checkpoint, or the folder of a run: its most recent checkpoint (to rewrite or export: most recent complete
one). The result of reshard, average and upcycle is a checkpoint too, that of import the folder of a run with one. A run
can start from it with training.warm_start, or resume from it if it is among the run's checkpoints and has optimizer
states.

exit status: 0 done, 1 verify found a damaged checkpoint, 2 invalid arguments or an impossible operation (one line on
stderr, nothing written), 130 interrupted."""

COMMANDS = {
    "inspect": "Describe a checkpoint, without verifying its files.",
    "verify": "Read every byte of a checkpoint, or of all checkpoints of a run.",
    "reshard": "Rewrite a checkpoint: in few files instead of one per rank, or without AdamW's moments. Loading never "
    "needs this: any layout and ZeRO stage can load the checkpoints of any other.",
    "average": "Average the weights of several checkpoints, as the start of another run.",
    "upcycle": "Make a chain of a model: of a mixture of experts, a chain with fewer iterations, or dense layers. Its "
    "first step computes what the model did. A run starts from it with the config chain.yaml in OUT.",
    "import": "Write a Hugging Face model (Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2 or V3, or an export of a "
    "chain) as the folder of a run, from which a run can start with training.warm_start.",
    "export": "Write a checkpoint as a Hugging Face model: safetensors, config.json, tokenizer, model card.",
}


def make_parser() -> Parser:
    parser = Parser(prog=program_name("coe-checkpoint", "checkpoint.py"), description=__doc__, epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    parsers = {name: commands.add_parser(name, help=about, description=about) for name, about in COMMANDS.items()}
    inspect, _, reshard, average, upcycle, from_hf, export = parsers.values()
    for command in parsers.values():
        more: dict[str, Any] = {"nargs": "+"} if command is average else {}
        command.add_argument("sources" if more else "source", type=user_path, metavar="DIR", **more)
    inspect.add_argument("--json", action="store_true", help="print one JSON object, with the optimizer's tensors")
    for command in (reshard, average, upcycle, from_hf, export):
        command.add_argument("out", type=user_path, metavar="OUT")
        command.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
    reshard.add_argument("--files", type=int, default=1, metavar="N", help="number of tensor files (default: 1)")
    reshard.add_argument("--weights-only", action="store_true", help="weights and fp32 masters, for a warm start")
    average.add_argument("--last", type=int, metavar="N", help="DIR is a run: average its most recent N checkpoints")
    _add_upcycle_options(upcycle)
    export.add_argument("--to", choices=["hf"], default="hf", help="the format: Hugging Face's (the only one)")
    export.add_argument(
        "--architecture",
        choices=["auto", "coe"],
        default="auto",
        help="auto: one that transformers knows if the model is one (Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, "
        "DeepSeek-V2, DeepSeek-V3), else coe, whose code comes along (default: auto)",
    )
    export.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of weights (default: as trained)")
    export.add_argument("--shard-gb", type=float, default=1.0, metavar="GB", help="size of a file (default: 1)")
    export.add_argument("--tokenizer", type=user_path, metavar="FILE", help="if the run's data are elsewhere now")
    return parser


def _add_upcycle_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--iterations", type=int, required=True, metavar="C", help="iterations of the chain")
    routers = (
        "of added iterations: copies; copies with shifted rows, which choose other experts; random (default: copy)"
    )
    parser.add_argument("--routers", metavar="copy|roll|fresh", help=routers)
    parser.add_argument("--seed", type=int, default=1234, metavar="S", help="of random weights (default: 1234)")
    config = "of the model in DIR, if it is not in the folder of a run"
    parser.add_argument("--config", type=user_path, metavar="FILE", help=config)
    changes = "other settings of the chain, such as chain.residual=init or moe.layer_freq=1 (docs/upcycling.md)"
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=changes)


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
    if not 0.001 <= getattr(options, "shard_gb", 1.0) <= 1000:
        raise ConfigError(f"--shard-gb is {options.shard_gb}: it must be between 0.001 and 1000")
    if getattr(options, "tokenizer", None) is not None:
        require_file(options.tokenizer, "--tokenizer")
    if getattr(options, "files", 1) < 1:
        raise ConfigError(f"--files is {options.files}: it must be at least 1")
    if getattr(options, "last", None) is not None and (options.last < 2 or len(sources) > 1):
        raise ConfigError(f"--last is {options.last}: it must be at least 2, with a single run as DIR")
    if options.command == "upcycle":
        plan_upcycling(options)


def plan_upcycling(options: argparse.Namespace) -> Upcycling:
    if options.iterations < 1:
        raise ConfigError(f"--iterations is {options.iterations}: it must be at least 1")
    if options.seed < 0:
        raise ConfigError(f"--seed is {options.seed}: it must be at least 0")
    config = find_config(options.source, options.config)
    return plan(config, options.out, options.iterations, options.routers, options.set, options.seed)


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
        case "upcycle":
            upcycle(options)
        case "import":
            from coe_megatron.convert.hf_import import import_model

            write_out(one_line(f"written: {import_model(options.source, options.out, options.overwrite, say)}"))
        case "export":
            write_out(one_line(f"written: {export(options)}"))
    return 0


def upcycle(options: argparse.Namespace) -> None:
    from coe_megatron.convert import upcycle as conversion

    planned = plan_upcycling(options)
    written = conversion.upcycle(options.source, options.out, planned, options.overwrite)
    write_out(one_line(f"written: {written}"))
    if planned.keeps_function:
        write_out("its first step computes what the model did")
    else:
        topk = planned.source.moe.topk, planned.target.moe.topk
        write_out(f"moe.topk was {topk[0]} and is {topk[1]}: its first step does not compute what the model did")
    write_out(one_line(f"train it: launch/pretrain_coe.py {written / CONFIG} output=RUN"))
    write_out(one_line(f"or with the model's config and: {' '.join(planned.changes())}"))


def export(options: argparse.Namespace) -> Path:
    from coe_megatron.convert import export as hugging_face
    from coe_megatron.convert.source import Source

    return hugging_face.export(
        Source.find(options.source, options.tokenizer),
        options.out,
        options.architecture,
        options.dtype,
        shard_bytes=int(options.shard_gb * 1e9),
        overwrite=options.overwrite,
        say=say,
    )


def say(line: str) -> None:
    """Print a line about progress."""
    print(one_line(line), file=sys.stderr, flush=True)


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
