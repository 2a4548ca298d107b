"""Test how other packages detect this one: they use it with the CUDA extension, and in a wheel without the
extension, those that look for it don't find it.

Each check is the client's own, shortened. docs/clients.md says what the user of each client sees.
"""

import gc
import importlib
import sys
import weakref
from importlib import metadata, util
from types import SimpleNamespace

import pytest
from flash_attn import extension, flash_attn_interface
from packaging.version import Version

from package import EXTENSION


@pytest.fixture(params=[False, True], ids=["without", "with"])
def compiled(request, monkeypatch) -> bool:
    """Whether the extension can be imported."""
    module = SimpleNamespace(__name__="flash_attn_2_cuda") if request.param else None
    monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", module)
    extension._found.cache_clear()
    yield request.param
    extension._found.cache_clear()


def xformers_finds_it() -> bool:
    """As xformers/ops/fmha/flash.py (0.0.30 to 0.0.35), when xformers.ops is imported."""
    if hasattr(flash_attn_interface, "flash_attn_cuda"):
        return flash_attn_interface.flash_attn_cuda is not None
    return flash_attn_interface.flash_attn_gpu is not None


def unsloth_finds_it() -> bool:
    """As unsloth/models/_utils.py (2026.10): HAS_FLASH_ATTENTION, else it uses xformers or SDPA."""
    try:
        try:
            from flash_attn.flash_attn_interface import flash_attn_gpu  # noqa: F401
        except:  # noqa: E722
            from flash_attn.flash_attn_interface import flash_attn_cuda  # noqa: F401
        return True
    except Exception:
        return False


def transformer_engine_finds_it() -> bool:
    """As transformer_engine/pytorch/attention/dot_product_attention/backends.py, at import."""
    importlib.import_module("flash_attn_2_cuda")
    return True


def test_unsloth_falls_back_without_the_extension(compiled):
    assert unsloth_finds_it() is compiled


@pytest.mark.parametrize(
    "check, error", [(xformers_finds_it, AttributeError), (transformer_engine_finds_it, ImportError)]
)
def test_who_takes_the_extension_for_granted_stops_at_import(compiled, check, error):
    if compiled:
        assert check()
    else:
        with pytest.raises(error):
            check()


def test_the_version_is_one_that_transformers_takes_and_says_what_is_lacking():
    """transformers/utils/import_utils.py (5.24) checks nothing else. A call with softmax on a GPU reports the
    missing extension (test_interface.py).
    """
    version = metadata.version("flash-attn")
    assert Version(version) >= Version("2.3.3")
    assert version.endswith(".cpu") is (util.find_spec(EXTENSION) is None)


def test_what_clients_find_is_called_as_the_extension_is(compiled):
    """Clients call it by the extension's function names, with upstream's arguments."""
    found = getattr(flash_attn_interface, "flash_attn_gpu", None)
    assert (found is not None) is compiled
    assert found is None or all(callable(getattr(found, name)) for name in extension.SIGNATURES)


def test_the_interface_has_no_other_name_by_accident():
    with pytest.raises(AttributeError, match="flash_attn_interface' has no attribute 'no_such_name'"):
        flash_attn_interface.no_such_name  # noqa: B018


@pytest.mark.parametrize("compiled", [False], indirect=True)
def test_a_missing_extension_keeps_nothing_of_the_first_call(compiled):
    """The remembered ImportError has no traceback, whose frames would keep the tensors of the call."""

    class Tensor:
        pass

    def first_call():
        q = Tensor()
        with pytest.raises(ImportError):
            extension.load()
        return weakref.ref(q)

    gc.disable()
    try:
        assert first_call()() is None
    finally:
        gc.enable()
