"""coe-check-nodes as the tests of SLURM start it: the nodes that COE_TEST_BAD names are bad."""

import argparse
import json
import os
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--output", required=True)
parser.add_argument("--report", type=Path)
parser.add_argument("--rendezvous", required=True)
options = parser.parse_args()
if os.environ["SLURM_NODEID"] == "0":
    bad = dict.fromkeys(os.environ["COE_TEST_BAD"].split(), "the disk is full")
    options.report.write_text(json.dumps({"bad": bad}))
