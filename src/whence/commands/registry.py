"""The commands by name, in the order of the help."""

from __future__ import annotations

from collections.abc import Callable

from whence.commands.acting import clean, select
from whence.commands.attribute import fit, score, self_influence
from whence.commands.demo import demo
from whence.commands.evaluate import evaluate
from whence.commands.explain import explain, report, top
from whence.commands.spectrum import spectrum

COMMANDS: dict[str, Callable[..., None]] = {
    "fit": fit,
    "score": score,
    "top": top,
    "self-influence": self_influence,
    "explain": explain,
    "clean": clean,
    "select": select,
    "evaluate": evaluate,
    "report": report,
    "spectrum": spectrum,
    "demo": demo,
}
