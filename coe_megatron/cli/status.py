"""How runs stand: a table of every run in some folders and below them, read from the runs' own files."""

import argparse
import json
import math
import sys
import time

from coe_megatron.cli.arguments import Parser, program_name, write_out
from coe_megatron.errors import ConfigError
from coe_megatron.files import require_folder, user_path
from coe_megatron.run.status import statuses, table

EPILOG = """examples:
  %(prog)s runs                  all runs below runs
  %(prog)s runs --watch 10       the same, anew every ten seconds until Ctrl-C
  %(prog)s runs/mine --json      a JSON array with an object for each run

state: waiting (started, not come to its steps yet), running, finished, interrupted, failed, died (without a word);
"no run" is said of a folder without one, "unreadable" of a run.json that is damaged.

exit status: 0 done, 2 a mistake (one line on stderr says which), 130 interrupted from the keyboard."""
CLEAR = "\033[H\033[2J"  # cursor to the top, all erased


def parser() -> Parser:
    made = Parser(prog=program_name("coe-status", "status.py"), description=__doc__, epilog=EPILOG)
    made.add_argument(
        "folders", type=user_path, nargs="+", metavar="DIR", help="the folder of a run, or one with runs in it"
    )
    made.add_argument("--watch", type=seconds, metavar="SECONDS", help="show it again so often, until Ctrl-C")
    made.add_argument("--json", action="store_true", help="for programs, unrounded; null is what is not known")
    return made


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return value


def show(options: argparse.Namespace) -> bool:
    """Print how the runs stand now; False if nobody reads it."""
    rows = statuses(options.folders)
    if options.json:
        return write_out(json.dumps([row.as_dict() for row in rows], indent=2))
    clear = CLEAR if options.watch and sys.stdout.isatty() else ""
    return write_out(clear + table(rows, time.time()))


def main() -> int:
    program = parser()
    options = program.parse_args()
    try:
        for folder in options.folders:
            require_folder(folder, "DIR")
    except ConfigError as error:
        program.error(str(error))
    try:
        while show(options) and options.watch:
            time.sleep(options.watch)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
