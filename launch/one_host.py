"""Runs torchrun on this host, supervised; see one_host.py --help."""

import sys

from coe_megatron.cli.one_host import main

if __name__ == "__main__":
    sys.exit(main())
