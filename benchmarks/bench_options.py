"""Common parts of the benchmark programs: options, JSON output, exit status."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coe_megatron import scratch
from coe_megatron.cli.arguments import Parser
from coe_megatron.distributed.environment import whole_number
from coe_megatron.errors import ConfigError
from coe_megatron.files import problem, require_folder, require_replaceable, user_path, write_atomically
from coe_megatron.text import shortened

LARGEST = 1 << 31
Measure = Callable[[argparse.Namespace, Parser], int]


def parser(name: str, about: str) -> Parser:
    """A parser with the options that all benchmarks have."""
    made = Parser(prog=name, description=about)
    clock = "cpu: this process's CPU time, for busy machines"
    made.add_argument("--clock", choices=("wall", "cpu"), default="wall", help=clock)
    made.add_argument("--json", type=user_path, metavar="FILE", help="also write the results to this file")
    return made


def run(made: Parser, measure: Measure, arguments: list[str] | None) -> int:
    """Parse, measure; returns the exit status."""
    options = made.parse_args(arguments)
    try:
        if getattr(options, "json", None) is not None:
            require_folder(options.json.parent, "the folder of --json")
            require_replaceable(options.json, "--json")
        scratch.enter()
        return measure(options, made)
    except ConfigError as error:
        made.error(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def positive(text: str) -> int:
    """The type of an option that is a count."""
    try:
        return whole_number("the value", text, 1, LARGEST)
    except ConfigError:
        raise argparse.ArgumentTypeError(f"{shortened(text, 50)!r} is not an integer from 1 to {LARGEST}") from None


def write(path: Path | None, document: dict[str, Any]) -> None:
    """Write the results as JSON if --json was given."""
    if path is not None:
        try:
            write_atomically(path, json.dumps(document, indent=1) + "\n")
        except OSError as error:
            raise problem(path, "--json", error) from None
