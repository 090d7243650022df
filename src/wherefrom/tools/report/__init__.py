"""One self-contained HTML page on any scores: what was asked, who answers for it, and how far to trust it."""

from wherefrom.tools.report.examples import Example
from wherefrom.tools.report.page import render, write_report
from wherefrom.tools.report.sections import DampingSweep, Table
from wherefrom.tools.report.split import Split

__all__ = ["DampingSweep", "Example", "Split", "Table", "render", "write_report"]
