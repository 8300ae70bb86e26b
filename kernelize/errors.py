"""The two failures that reach a user: one line each, no traceback."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class KernelizeError(Exception):
    """Something went wrong while working; the command ends with exit code 1."""

    exit_code = 1


class InputError(KernelizeError):
    """What the user gave cannot be used; names the thing, its value and what is allowed. Exit code 2."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """What an error says, in a line, two where the first announces the second; its kind if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def first_problem(error: ValidationError) -> str:
    """The first thing that pydantic finds wrong in data, and where it stands: `stages[0].steps: …, not 'x'`."""
    problem = error.errors()[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
    if problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
    else:
        message = f"{problem['msg']}, not {problem['input']!r}".replace("a valid tuple", "a list")
    return f"{place}: {message}" if place else message
