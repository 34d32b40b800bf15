"""Prepares text for training; prepare_data.py --help says how."""

import sys

from coe_megatron.cli.prepare_data import main

if __name__ == "__main__":
    sys.exit(main())
