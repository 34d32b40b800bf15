"""Shows how runs stand; status.py --help says how."""

import sys

from coe_megatron.cli.status import main

if __name__ == "__main__":
    sys.exit(main())
