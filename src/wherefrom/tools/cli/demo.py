"""The demo as a command."""

from __future__ import annotations

from wherefrom.tools import demo as digits
from wherefrom.tools.cli.results import say


def demo(
    out: str = "wherefrom-demo/report.html", seed: int = 0, queries: int = 6, examples: int = 1000, lds: bool = True
) -> None:
    """Find the training digits behind a network's answers, and the wrong labels among them.

    For example: wherefrom demo --out digits.html

    Trains a small network on handwritten digits, a tenth of them with a wrong label, attributes its answers to the
    training examples, ranks these by self-influence, checks the scores by retraining, and writes an HTML report.

    Args:
        out: the report to write.
        seed: of the data, the training and everything else.
        queries: held-out digits to show, at most 40.
        examples: digits to train on, 100 to 1300; time grows with the square.
        lds: check against retraining.
    """
    digits.run(say, out, seed, queries, examples, lds)
