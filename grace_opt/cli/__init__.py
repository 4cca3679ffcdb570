"""The command line: one module a command."""

from grace_opt.cli.main import main

__all__ = ["main"]
