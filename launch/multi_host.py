"""Pretrains on several hosts without SLURM; see multi_host.py --help."""

import sys

from coe_megatron.cli.multi_host import main

if __name__ == "__main__":
    sys.exit(main())
