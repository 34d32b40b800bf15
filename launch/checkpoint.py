"""Looks at checkpoints, verifies and rewrites them; see checkpoint.py --help."""

import sys

from coe_megatron.cli.checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
