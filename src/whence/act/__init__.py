"""What people do with attributions: clean data, choose data, explain predictions."""

from whence.act.clean import Cleaning, Proposal, clean
from whence.act.explain import explain
from whence.act.select import Selection, cleanest, select

__all__ = ["Cleaning", "Proposal", "Selection", "clean", "cleanest", "explain", "select"]
