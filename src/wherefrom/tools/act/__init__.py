"""What people do with attributions: clean data, choose data, explain predictions."""

from wherefrom.tools.act.clean import Cleaning, Proposal, clean
from wherefrom.tools.act.explain import explain
from wherefrom.tools.act.select import Selection, cleanest, select

__all__ = ["Cleaning", "Proposal", "Selection", "clean", "cleanest", "explain", "select"]
