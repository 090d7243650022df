"""The measurements of finished runs, in a folder: a piece for each chunk of runs, written whole or not at all.

A piece holds the names of its runs, which are hashes of their subset and seed, and their measurements. Pieces are never
changed, so that several processes may add to one folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from wherefrom.errors import ArtefactError
from wherefrom.store import Shards, wrong_contents

KIND = "runs"
NAME_BYTES = 16


def read_runs(pieces: Shards) -> dict[str, Tensor]:
    """Read the measurements (Q,) of all runs in a folder, by name; none if there is no folder yet.

    Raises:
        ArtefactError: if a piece is damaged, or was made of something else; it says what differs.
    """
    measurements: dict[str, Tensor] = {}
    for path in sorted(pieces.folder.glob(f"{KIND}-*.safetensors")):
        try:
            shapes = {"names": (None, NAME_BYTES), "targets": (None, None)}
            piece = pieces.get(path.stem.removeprefix(f"{KIND}-"), shapes, dtypes={"names": torch.uint8})
            if piece is None:  # another process has removed it since the folder was listed
                continue
            names, targets = piece["names"], piece["targets"]
            if len(names) != len(targets):
                raise wrong_contents(path, "a name for each run", f"{len(names)} for {len(targets)}")
        except ArtefactError as error:
            raise ArtefactError(f"{error} Or give another folder; deleting a file only costs its runs.") from error
        for name, values in zip(names.tolist(), targets, strict=True):
            measurements[bytes(name).hex()] = values
    return measurements


def write_runs(pieces: Shards, measurements: Mapping[str, Tensor]) -> None:
    """Add a chunk of runs: the measurements (Q,) of each, by its name."""
    names = torch.tensor([list(bytes.fromhex(name)) for name in measurements], dtype=torch.uint8)  # (K, 16)
    # A hash of the names: different chunks have different files, whichever process writes them.
    label = hashlib.blake2b("".join(measurements).encode(), digest_size=8).hexdigest()
    pieces.put(label, {"names": names, "targets": torch.stack(list(measurements.values()))})
