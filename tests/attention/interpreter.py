"""Make Triton's interpreter twice as fast, by leaving out what it does in vain.

Results are the same. A release of triton with other insides is left as it is.
"""

from __future__ import annotations

import dataclasses

_NEEDED = ("_patch_lang", "_LangPatchScope", "_get_np_dtype", "interpreter_builder")


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
