"""The commands of the command line, one function each."""

from whence.commands.config import configured
from whence.commands.registry import COMMANDS
from whence.commands.results import releasing
from whence.commands.run import heard

__all__ = ["COMMANDS", "configured", "heard", "releasing"]
