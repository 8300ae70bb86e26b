"""The two failures that reach a user: one line each, no traceback."""


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
