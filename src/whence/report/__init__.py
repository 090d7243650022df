"""One self-contained HTML page on any scores: what was asked, who answers for it, and how far to trust it."""

from whence.report.examples import Example
from whence.report.page import render, write_report
from whence.report.sections import DampingSweep, Table
from whence.report.split import Split

__all__ = ["DampingSweep", "Example", "Split", "Table", "render", "write_report"]
