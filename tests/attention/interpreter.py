"""Make Triton's interpreter twice as fast, by leaving out what it does in vain, and teach it bfloat16.

Other results are the same. A release of triton with other insides is left as it is.
"""

from __future__ import annotations

import dataclasses

_NEEDED = ("_patch_lang", "_LangPatchScope", "_get_np_dtype", "interpreter_builder", "TensorHandle")


def quicken() -> bool:
    """Change the interpreter of this process. Returns whether it has the insides that this file knows."""
    try:
        from triton.language import core
        from triton.runtime import interpreter
    except ImportError:
        return False
    if not all(hasattr(interpreter, name) for name in _NEEDED):
        return False
    _patch_once_a_launch(interpreter)
    _look_up_dtypes_once(interpreter, core)
    _teach_bfloat16(interpreter, core.bfloat16, core.float32)
    # Without `debug` it computes whether a sum overflows, and then does not assert it.
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(
        options, sanitize_overflow=options.sanitize_overflow and options.debug
    )
    return True


def _patch_once_a_launch(interpreter) -> None:
    """A launch replaces the functions of triton.language by interpreted ones, and restores them at its end.
    Each call of a device function in between would replace them once more.
    """
    patch, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    patched: set[int] = set()  # the modules whose functions this launch has called, by their names

    def patch_once(fn):
        if id(fn.__globals__) in patched:
            return None  # a device function does not restore what it has patched
        patched.add(id(fn.__globals__))
        return patch(fn)

    def restore_all(scope) -> None:
        patched.clear()
        restore(scope)

    interpreter._patch_lang, interpreter._LangPatchScope.restore = patch_once, restore_all


def _look_up_dtypes_once(interpreter, core) -> None:
    """The type of NumPy for one of Triton, which depends on that of the elements."""
    look_up, known = interpreter._get_np_dtype, {}

    def get(dtype):
        scalar = dtype.scalar
        if isinstance(scalar, core.pointer_type):
            return look_up(scalar)
        if scalar.name not in known:
            known[scalar.name] = look_up(scalar)
        return known[scalar.name]

    interpreter._get_np_dtype = get


def _teach_bfloat16(interpreter, bfloat16, float32) -> None:
    """NumPy has no bfloat16, so the interpreter keeps its bits as integers. It would multiply these in a
    product, of matrices or not, and rounds towards 0.
    """
    import numpy as np  # which the interpreter needs, and the project does not

    handle, builder = interpreter.TensorHandle, type(interpreter.interpreter_builder)
    cast, convert, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot
    multiply, fused = builder.create_fmul, builder.create_fma

    def widened(x):
        return handle((x.data.astype(np.uint32) << np.uint32(16)).view(np.float32), float32)

    def rounded(x):  # to the nearest, the even one of two; NaN stays NaN
        bits = np.ascontiguousarray(x).view(np.uint32)
        nearest = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(x), np.uint16(0x7FC0), nearest.astype(np.uint16))

    def cast_impl(self, src, dst_type):
        known, wanted = src.dtype.scalar == bfloat16, dst_type.scalar == bfloat16
        if wanted and not known:
            return handle(rounded(src.data.astype(np.float32)), bfloat16)
        return cast(self, widened(src) if known and not wanted else src, dst_type)

    def create_dot(self, a, b, *more):
        return dot(self, *(widened(x) if x.dtype.scalar == bfloat16 else x for x in (a, b)), *more)

    def create_fmul(self, a, b):
        if a.dtype.scalar != bfloat16:
            return multiply(self, a, b)
        return handle(rounded(widened(a).data * widened(b).data), bfloat16)

    def create_fma(self, a, b, c):
        if a.dtype.scalar != bfloat16:
            return fused(self, a, b, c)
        # float64 holds the product, and rounds the sum so little that float32 makes no difference.
        a, b, c = (widened(x).data.astype(np.float64) for x in (a, b, c))
        return handle(rounded((a * b + c).astype(np.float32)), bfloat16)

    def create_fp_to_fp(self, src, dst_type, rounding):
        if bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return convert(self, src, dst_type, rounding)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast_impl, create_fp_to_fp, create_dot
    builder.create_fmul, builder.create_fma = create_fmul, create_fma
