"""The commands by name, in the order of the help."""

from __future__ import annotations

from collections.abc import Callable

from wherefrom.tools.cli.act import clean, select
from wherefrom.tools.cli.attribute import fit, score, self_influence
from wherefrom.tools.cli.demo import demo
from wherefrom.tools.cli.evaluate import evaluate
from wherefrom.tools.cli.explain import explain, report, top
from wherefrom.tools.cli.spectrum import spectrum

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
