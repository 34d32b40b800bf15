"""Generates text with a trained model; see generate.py --help."""

import sys

from coe_megatron.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
