"""Studies: many runs that answer one question, from one file that says what is compared."""

import argparse
import json
import math
import sys
from pathlib import Path

from coe_megatron.config import ConfigError
from coe_megatron.config.arguments import Parser, write_out
from coe_megatron.forecast.devices import DEVICES
from coe_megatron.study.plan import make_plan

EPILOG = """examples:
  study.py plan configs/studies/paper/main-pair.yaml
  study.py plan configs/studies/cpu/main-pair.yaml --calibration runs/cpu/moe_8-64
  study.py plan configs/studies/paper/width.yaml --device h100 --price 2.50 training.steps=500

exit status: 0 done, 2 a mistake (one line on stderr says which)."""
PLAN = "Say what a study will cost before anything runs: a row for each arm. Needs no data."


def parser() -> Parser:
    made = Parser(prog="study.py", description=__doc__, epilog=EPILOG)
    commands = made.add_subparsers(dest="command", required=True, metavar="plan")
    plan = commands.add_parser("plan", help=PLAN, description=PLAN)
    plan.add_argument("study", type=Path, metavar="STUDY.yaml", help="such as configs/studies/cpu/main-pair.yaml")
    plan.add_argument("overrides", nargs="*", default=[], help="key.sub=value, for all arms")
    device = f"on which hours are foreseen: {', '.join(DEVICES)} (default: the study's `device`)"
    plan.add_argument("--device", metavar="NAME", help=device)
    speed = "the folder of a finished run on such a device: hours follow from what it took"
    plan.add_argument("--calibration", type=Path, metavar="RUN", help=speed)
    plan.add_argument(
        "--device-memory", metavar="SIZE", help="that arms must fit, such as 80GiB (default: the device's)"
    )
    plan.add_argument("--price", type=price, metavar="PRICE", help="of an hour of one device, for the total cost")
    plan.add_argument("--json", action="store_true", help="as one JSON object, unrounded")
    return made


def price(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number of at least 0")
    return value


def main(arguments: list[str] | None = None) -> int:
    program = parser()
    options, late = program.parse_known_args(arguments)  # late: argparse takes no overrides behind options
    if unknown := [text for text in late if text.startswith("-")]:
        program.error(f"unrecognized arguments: {' '.join(unknown)}")
    overrides = [*options.overrides, *late]
    try:
        plan = make_plan(
            options.study, overrides, options.device, options.calibration, options.device_memory, options.price
        )
    except ConfigError as error:
        program.error(str(error))
    write_out(json.dumps(plan.as_dict(), indent=2) if options.json else plan.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
