"""What finished runs gave, kept in a folder: one file for each chunk of runs, written whole or not at all.

A file holds the names of its runs, which are hashes of their subset and seed, their measurements, and what they were
made of. Files are never changed, so that several processes may add to one folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from whence import store
from whence.errors import ArtefactError


def read(folder: str | Path, made_of: Mapping[str, str]) -> dict[str, Tensor]:
    """The measurements (Q,) of all runs in a folder, by name; none if there is no folder yet.

    Raises:
        ArtefactError: if a file is damaged, or was made of something else; it says what differs.
    """
    done: dict[str, Tensor] = {}
    for path in sorted(Path(folder).glob("runs-*.safetensors")):
        try:
            found, header = store.load(path, "runs")
            store.same(path, header, {key: made_of.get(key) for key in [*made_of, *header]})
        except ArtefactError as error:
            raise ArtefactError(f"{error} Or give another folder; deleting a file only costs its runs.") from error
        done |= {bytes(name.tolist()).hex(): v for name, v in zip(found["names"], found["targets"], strict=True)}
    return done


def write(folder: str | Path, made_of: Mapping[str, str], found: Mapping[str, Tensor]) -> None:
    """Add a chunk of runs."""
    name = hashlib.blake2b("".join(found).encode(), digest_size=8).hexdigest()
    names = torch.tensor([list(bytes.fromhex(name)) for name in found], dtype=torch.uint8)  # (K, 16)
    tensors = {"names": names, "targets": torch.stack(list(found.values()))}
    store.save(Path(folder) / f"runs-{name}.safetensors", "runs", tensors, dict(made_of))
