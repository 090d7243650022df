"""One thread for all tests: their problems are tiny, and threads that wait for each other take several times longer."""

from __future__ import annotations

import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
torch.set_num_threads(1)
