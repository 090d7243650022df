"""One self-contained HTML page on any scores: what was asked, who answers for it, and how far to trust it."""

from whence.report.examples import Example
from whence.report.page import render, write_report

__all__ = ["Example", "render", "write_report"]
