"""Checks nodes before a run; see check_nodes.py --help."""

import sys

from coe_megatron.cli.check_nodes import main

if __name__ == "__main__":
    sys.exit(main())
