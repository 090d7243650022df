"""The command line: one module a command, one function each."""
