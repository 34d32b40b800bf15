"""Pretrains on several hosts without SLURM; multi_host.py --help says how."""

import sys

from coe_megatron.cli.multi_host import main

if __name__ == "__main__":
    sys.exit(main())
