"""What finished runs gave, kept in a folder: a piece for each chunk of runs, written whole or not at all.

A piece holds the names of its runs, which are hashes of their subset and seed, and their measurements. Pieces are never
changed, so that several processes may add to one folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from wherefrom.errors import ArtefactError
from wherefrom.store import Shards, wrong

KIND = "runs"


def read(pieces: Shards) -> dict[str, Tensor]:
    """The measurements (Q,) of all runs in a folder, by name; none if there is no folder yet.

    Raises:
        ArtefactError: if a piece is damaged, or was made of something else; it says what differs.
    """
    done: dict[str, Tensor] = {}
    for path in sorted(pieces.folder.glob(f"{KIND}-*.safetensors")):
        try:
            shapes = {"names": (None, 16), "targets": (None, None)}
            found = pieces.get(path.stem.removeprefix(f"{KIND}-"), shapes, dtypes={"names": torch.uint8})
            if found is None:  # another process removed it since
                continue
            names, targets = found["names"], found["targets"]
            if len(names) != len(targets):
                raise wrong(path, "a name for each run", f"{len(names)} for {len(targets)}")
        except ArtefactError as error:
            raise ArtefactError(f"{error} Or give another folder; deleting a file only costs its runs.") from error
        done |= {bytes(name).hex(): v for name, v in zip(names.tolist(), targets, strict=True)}
    return done


def write(pieces: Shards, found: Mapping[str, Tensor]) -> None:
    """Add a chunk of runs."""
    names = torch.tensor([list(bytes.fromhex(name)) for name in found], dtype=torch.uint8)  # (K, 16)
    label = hashlib.blake2b("".join(found).encode(), digest_size=8).hexdigest()
    pieces.put(label, {"names": names, "targets": torch.stack(list(found.values()))})
