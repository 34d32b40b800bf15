"""Prepares text for training; see prepare_data.py --help."""

import sys

from coe_megatron.cli.prepare_data import main

if __name__ == "__main__":
    sys.exit(main())
