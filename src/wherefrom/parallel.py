"""torch.distributed in a few functions; with one process each is a no-op."""

from __future__ import annotations

import torch.distributed as dist


def active() -> bool:
    """Whether a process group is running."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if active() else 0
