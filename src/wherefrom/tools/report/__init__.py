"""One self-contained HTML page on any scores: what was asked, who answers for it, and how far to trust it."""

from wherefrom.tools.report.convergence import Convergence
from wherefrom.tools.report.damping import DampingSweep
from wherefrom.tools.report.examples import Example
from wherefrom.tools.report.layers import Layers
from wherefrom.tools.report.overview import Notes, Overview
from wherefrom.tools.report.provenance import Provenance
from wherefrom.tools.report.queries import Queries
from wherefrom.tools.report.report import Report, usual_sections, write_report
from wherefrom.tools.report.retraining import Retraining
from wherefrom.tools.report.section import Section, Tile
from wherefrom.tools.report.split import Split
from wherefrom.tools.report.spread import Spread
from wherefrom.tools.report.suspects import Suspects
from wherefrom.tools.report.table import Table

__all__ = [
    "Convergence",
    "DampingSweep",
    "Example",
    "Layers",
    "Notes",
    "Overview",
    "Provenance",
    "Queries",
    "Report",
    "Retraining",
    "Section",
    "Split",
    "Spread",
    "Suspects",
    "Table",
    "Tile",
    "usual_sections",
    "write_report",
]
