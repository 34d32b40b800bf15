"""Looks at checkpoints, verifies and rewrites them; checkpoint.py --help says how."""

import sys

from coe_megatron.cli.checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
