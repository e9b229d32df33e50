"""The command line: one verb a file, each one call of the public API."""

from lmpress.cli.app import main

__all__ = ["main"]
