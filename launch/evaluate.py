"""Evaluates a checkpoint, on one rank or under torchrun; see evaluate.py --help."""

import sys

from coe_megatron.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
