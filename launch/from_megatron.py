"""Prints the config of a Megatron-LM command; see from_megatron.py --help."""

import sys

from coe_megatron.cli.from_megatron import main

if __name__ == "__main__":
    sys.exit(main())
