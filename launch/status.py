"""Shows the status of runs; see status.py --help."""

import sys

from coe_megatron.cli.status import main

if __name__ == "__main__":
    sys.exit(main())
