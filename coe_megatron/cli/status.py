"""Shows the status of runs: a table of all runs in some folders and below them, read from the runs' own files."""

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
  %(prog)s runs --watch 10       the same, repeated every ten seconds until Ctrl-C
  %(prog)s runs/mine --json      a JSON array with an object for each run

state: waiting (started, no step yet), running, finished, interrupted, failed, died (without recording its end),
"no run" (there is none in this folder) or "unreadable" (run.json is damaged).

exit status: 0 done, 2 invalid arguments (one line on stderr), 130 interrupted from the keyboard."""
CLEAR = "\033[H\033[2J"  # moves the cursor to the top and erases the screen


def make_parser() -> Parser:
    parser = Parser(prog=program_name("coe-status", "status.py"), description=__doc__, epilog=EPILOG)
    parser.add_argument(
        "folders", type=user_path, nargs="+", metavar="DIR", help="the folder of a run, or a folder that contains runs"
    )
    parser.add_argument("--watch", type=seconds, metavar="SECONDS", help="repeat at this interval, until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="print JSON for programs: unrounded, null means unknown")
    return parser


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return value


def show(options: argparse.Namespace) -> bool:
    """Print the present status of the runs; False if the reader of stdout has ended."""
    rows = statuses(options.folders)
    if options.json:
        return write_out(json.dumps([row.as_dict() for row in rows], indent=2))
    clear = CLEAR if options.watch and sys.stdout.isatty() else ""
    return write_out(clear + table(rows, time.time()))


def main() -> int:
    parser = make_parser()
    options = parser.parse_args()
    try:
        for folder in options.folders:
            require_folder(folder, "DIR")
    except ConfigError as error:
        parser.error(str(error))
    try:
        while show(options) and options.watch:
            time.sleep(options.watch)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
