"""The command line: each command is a library call with printing around it."""

from convscope.cli.entry import app, main

__all__ = ["app", "main"]
