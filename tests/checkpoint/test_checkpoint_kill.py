"""SIGKILL at random moments of saving: a whole checkpoint is always there, and no process is left over."""

import multiprocessing
import os
import random
import signal
import subprocess
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from programs import Program, python

from coe_megatron.checkpoint import listing
from coe_megatron.checkpoint.seal import problem

KILLS = 20
pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]
