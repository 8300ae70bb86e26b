"""The command line: each command reads, validates, calls one library function and prints."""

from .app import main

__all__ = ["main"]
