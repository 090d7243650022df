"""The version of the library, which is recorded in all that it writes."""

__version__ = "0.1.0"
