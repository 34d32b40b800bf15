"""Runs torchrun on this host, supervised; one_host.py --help says how."""

import sys

from coe_megatron.cli.one_host import main

if __name__ == "__main__":
    sys.exit(main())
