"""Triton's interpreter, made to round as GPUs do, so that its results can be compared bit for bit, and made faster."""

from typing import Any

import numpy as np
import torch


def multiply_add(x: Any, y: Any, z: Any) -> Any:
    """Return x y + z of numpy arrays of float32, rounded once.

    The product is exact in double. What its sum with z loses there matters in float32 only at ties, so that a sum that
    lost something gets an odd last bit.
    """
    with np.errstate(all="ignore"):
        product, addend = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
        total = np.asarray(product + addend)
        part = total - product
        lost = (product - (total - part)) + (addend - part)
        even = (total.view(np.int64) & 1 == 0) & np.isfinite(lost) & (lost != 0)
        exact = np.where(even, np.nextafter(total, np.where(lost > 0, np.inf, -np.inf)), total)
        return exact.astype(z.dtype)


def round_as_hardware() -> None:
    """Replace what it rounds otherwise (triton 3.5 to 3.7): a multiply-add, and conversions from and to bfloat16."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def fused(self: Any, x: Any, y: Any, z: Any) -> Any:
        return TensorHandle(multiply_add(x.data, y.data, z.data), z.dtype.scalar)

    def converted(self: Any, value: Any, dtype: Any) -> Any:
        pair = (value.dtype.scalar, dtype.scalar)
        if pair == (tl.float32, tl.bfloat16):
            halves = torch.from_numpy(np.ascontiguousarray(value.data)).bfloat16().view(torch.int16)
            return TensorHandle(halves.numpy().view(np.uint16), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            halves = torch.from_numpy(np.ascontiguousarray(value.data).view(np.int16)).view(torch.bfloat16)
            return TensorHandle(halves.float().numpy(), tl.float32)
        return cast(self, value, dtype)

    InterpreterBuilder.create_fma = fused
    InterpreterBuilder.cast_impl = converted


def patch_once() -> None:
    """Let it patch triton.language where a kernel is launched, and not again at each call of a function in a kernel.

    It lists all of triton.language to do so, which was more than half of its time.
    """
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_unless_patched(function: Any) -> Any:
        # kernels call functions of tl, and those of Triton's own library call functions of tl.core
        if any(is_builtin(language.load) for language in (interpreter.tl, interpreter.tl.core)):
            return patch(function)
        return interpreter._LangPatchScope()  # nothing to undo

    interpreter._patch_lang = patch_unless_patched
