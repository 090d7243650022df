"""The commands by name, in the order of the help."""

from __future__ import annotations

from collections.abc import Callable

from whence.commands.attribute import fit, score, self_influence, top
from whence.commands.demo import demo
from whence.commands.evaluate import evaluate
from whence.commands.spectrum import spectrum

COMMANDS: dict[str, Callable[..., None]] = {
    "fit": fit,
    "score": score,
    "top": top,
    "self-influence": self_influence,
    "spectrum": spectrum,
    "evaluate": evaluate,
    "demo": demo,
}
