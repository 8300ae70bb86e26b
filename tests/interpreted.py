"""Lets Triton's interpreter run with NumPy 2.4, which no longer makes an int of an array of one element.

Import it first, in a process with TRITON_INTERPRET=1; `tl.range` with bounds known only at run time needs it.
"""

from __future__ import annotations

import builtins

from triton.runtime import interpreter


def of_scalars(*bounds):
    """`range` whose bounds may be the interpreter's scalars."""
    return builtins.range(*(int(x.handle.data.item()) if hasattr(x, "handle") else x for x in bounds))


interpreter.range = of_scalars  # type: ignore[attr-defined]
