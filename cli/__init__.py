"""The command line: each command reads, validates, calls one library function and prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .codes import INTERRUPTED

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code. The commands are imported here, where Ctrl-C is no traceback yet."""
    try:
        from .app import main as run
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return run(arguments)
