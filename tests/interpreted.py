"""Repairs Triton 3.6's interpreter; import it first, in a process with TRITON_INTERPRET=1.

NumPy 2.4 no longer makes an int of an array of one element, which `tl.range` with bounds known only at run time needs;
and a product of bfloat16 matrices was one of the integers that hold their bits. Float32 becomes the nearest bfloat16,
as on a GPU, not the next towards zero: such errors are twice as large and add up. And it looks where a GPU would fault:
whatever a kernel touches must lie in one of the tensors that it was given. What each operation would make anew is made
once: laws take a third of the time so.
"""

from __future__ import annotations

import builtins
from types import SimpleNamespace

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


def cast(builder, x, to):
    if x.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
        bits = x.data.view(np.uint32)
        near = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
        near = np.where(np.isnan(x.data), bits >> 16 | 0x40, near)  # rounding up may not make a NaN something else
        return interpreter.TensorHandle(near.astype(np.uint16), tl.bfloat16)
    return plain_cast(builder, x, to)


def patch_once() -> None:
    """The language as the interpreter needs it, from now on: it would be patched in each call of a device function."""
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()  # type: ignore[assignment]


# What every operation asks for, made once: nothing changes any of it.
ELEMENTS: dict[str, np.dtype] = {}  # by the name of a scalar
BLOCKS: dict[tuple, tl.block_type] = {}  # by the scalar's name and the shape
SHAPES: dict[tuple, tuple] = {}  # number of elements and shape, by shape


def np_dtype(of: tl.dtype) -> np.dtype:
    """NumPy's type for the elements of `of`."""
    scalar = of.scalar
    if scalar.name not in ELEMENTS:
        ELEMENTS[scalar.name] = plain_np_dtype(scalar)
    return ELEMENTS[scalar.name]


def init_block(self, element_ty: tl.dtype, shape) -> None:
    key = element_ty.name, *(size.value if isinstance(size, tl.constexpr) else size for size in shape)
    if key not in BLOCKS:
        plain_init_block(self, element_ty, shape)
        BLOCKS[key] = self
    self.__dict__.update(BLOCKS[key].__dict__)


def init_tensor(self, handle, type: tl.dtype) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    key = (*type.shape.values,) if type.is_block() else ()
    if key not in SHAPES:
        plain_init_tensor(self, handle, type)
        SHAPES[key] = self.numel, self.shape
    self.numel, self.shape = SHAPES[key]


plain_init_block, plain_init_tensor = tl.block_type.__init__, tl.tensor.__init__
tl.block_type.__init__, tl.tensor.__init__ = init_block, init_tensor  # type: ignore[method-assign]
plain_dot = interpreter.InterpreterBuilder.create_dot
plain_np_dtype = interpreter._get_np_dtype
interpreter.InterpreterBuilder.create_dot = dot
plain_cast = interpreter.InterpreterBuilder.cast_impl
interpreter.InterpreterBuilder.cast_impl = cast
interpreter.range = of_scalars  # type: ignore[attr-defined]
interpreter._get_np_dtype = np_dtype
# without `debug` an overflow is computed with each sum and then not told
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
patch_once()


class Bounds:
    """Where the tensors of the present launch lie."""

    starts, ends = np.zeros(0, np.uint64), np.zeros(0, np.uint64)

    @classmethod
    def of(cls, tensors) -> None:
        storages = [x.untyped_storage() for x in tensors if hasattr(x, "untyped_storage")]
        ranges = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages})
        cls.starts, cls.ends = (np.array(x, np.uint64) for x in zip(*ranges, strict=True))

    @classmethod
    def check(cls, ptrs, mask) -> None:
        touched = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data.astype(bool)].astype(np.uint64)
        at = np.searchsorted(cls.starts, touched, "right").astype(np.int64) - 1
        width = np.uint64(max(ptrs.get_element_ty().primitive_bitwidth // 8, 1))
        if (at < 0).any() or (touched + width > cls.ends[at]).any():
            raise IndexError("a kernel touches what is in none of its tensors")


def init_args(self, args, kwargs):
    found = plain_init(self, args, kwargs)
    Bounds.of([*found[0], *found[1].values()])
    return found


def masked_load(builder, ptrs, mask, *rest):
    Bounds.check(ptrs, mask)
    return plain_load(builder, ptrs, mask, *rest)


def masked_store(builder, ptrs, value, mask, *rest):
    Bounds.check(ptrs, mask)
    return plain_store(builder, ptrs, value, mask, *rest)


def atomic(builder, op, ptrs, value, mask, *rest):
    Bounds.check(ptrs, mask)
    return plain_atomic(builder, op, ptrs, value, mask, *rest)


plain_init = interpreter.GridExecutor._init_args_hst
interpreter.GridExecutor._init_args_hst = init_args  # type: ignore[method-assign]
plain_load = interpreter.InterpreterBuilder.create_masked_load
plain_store = interpreter.InterpreterBuilder.create_masked_store
plain_atomic = interpreter.InterpreterBuilder.create_atomic_rmw
interpreter.InterpreterBuilder.create_masked_load = masked_load
interpreter.InterpreterBuilder.create_masked_store = masked_store
interpreter.InterpreterBuilder.create_atomic_rmw = atomic
