"""Repairs Triton 3.6's interpreter; import it first, in a process with TRITON_INTERPRET=1.

NumPy 2.4 no longer makes an int of an array of one element, which `tl.range` with bounds known only at run time needs;
and a product of bfloat16 matrices was one of the integers that hold their bits.
"""

from __future__ import annotations

import builtins

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def of_scalars(*bounds):
    """`range` whose bounds may be the interpreter's scalars."""
    return builtins.range(*(int(x.handle.data.item()) if hasattr(x, "handle") else x for x in bounds))


def widened(x):
    """A bfloat16 handle as float32; any other as it is."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def dot(builder, a, b, *rest):
    return plain_dot(builder, widened(a), widened(b), *rest)


plain_dot = interpreter.InterpreterBuilder.create_dot
interpreter.InterpreterBuilder.create_dot = dot
interpreter.range = of_scalars  # type: ignore[attr-defined]
