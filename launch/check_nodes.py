"""Checks nodes before a run; check_nodes.py --help says how."""

import sys

from coe_megatron.cli.check_nodes import main

if __name__ == "__main__":
    sys.exit(main())
