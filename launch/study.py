"""Plans, runs, submits and reports studies; see study.py --help."""

import sys

from coe_megatron.cli.study import main

if __name__ == "__main__":
    sys.exit(main())
