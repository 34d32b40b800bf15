"""Prints the config that trains as a Megatron-LM command does, and names each flag that has no counterpart."""

import argparse
import sys

from coe_megatron.cli.arguments import Parser, program_name, write_out
from coe_megatron.config.from_megatron import Translation, checked, translate, words
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.files import read_limited, user_path
from coe_megatron.parsing import CONFIG_BYTES, to_yaml

EPILOG = """examples:
  %(prog)s pretrain_mixtral.sh > mine.yaml
  %(prog)s -- --num-layers 32 --hidden-size 4096 ... > mine.yaml

A file is a command or a shell script: continued lines, quotes, plain variables and arrays of arguments are understood.
The table of flags is in docs/from-megatron.md. Megatron-LM need not be installed.

exit status: 0 printed, 2 the command cannot be read or the config would not be valid (one line on stderr)."""


def make_parser() -> Parser:
    parser = Parser(prog=program_name("coe-from-megatron", "from_megatron.py"), description=__doc__, epilog=EPILOG)
    parser.add_argument("file", type=user_path, nargs="?", metavar="FILE", help="a file with the command")
    return parser


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, and the flags of Megatron's after `--`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def page(found: Translation) -> str:
    """The YAML, with a comment for each flag without a counterpart."""
    comments = [one_line(f"# {note}") for note in found.notes]
    head = ["# Without a counterpart:", *comments, ""] if comments else []
    return "\n".join([*head, to_yaml(found.nested()).rstrip()])


def main() -> int:
    parser = make_parser()
    own, command = split_arguments(sys.argv[1:])
    options: argparse.Namespace = parser.parse_args(own)
    if (options.file is None) == (not command):
        parser.error("give a file with the command, or the command's flags after --")
    try:
        if options.file is not None:
            command = words(read_limited(options.file, "FILE", CONFIG_BYTES).decode(errors="replace"))
        found = translate(command)
        checked(found.nested())
    except ConfigError as error:
        parser.error(str(error))
    write_out(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
