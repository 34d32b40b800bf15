"""Plans, runs, submits and reports studies; study.py --help says how."""

import sys

from coe_megatron.cli.study import main

if __name__ == "__main__":
    sys.exit(main())
