"""Pretrains a Chain-of-Experts model: torchrun --nproc-per-node 2 launch/pretrain_coe.py CONFIG.yaml; see --help."""

import sys

from coe_megatron.cli.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
