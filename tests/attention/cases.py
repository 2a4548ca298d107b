"""The forty regression cases of the kernel audit and where each is tested.

A test names the cases it covers with ``@pytest.mark.case(...)`` and in its docstring. Cases that other test files cover
under their own heading, and cases that no CPU can run, stand here. ``test_cases.py`` checks that none is missing.
"""

from __future__ import annotations

CASES = range(1, 41)

ELSEWHERE = {
    30: ("test_interface.py", ("test_operators_pass_opcheck", "test_compiles_to_one_graph")),
    38: ("test_modules.py", ("test_flash_path_equals_fallback", "test_decoding_equals_the_full_pass")),
    39: (
        "test_interface.py",
        ("test_old_positional_callers", "test_old_positional_callers_of_operators_and_extension"),
    ),
    40: ("../patches/test_sass_identity.py", ("test_kernels_with_softmax_are_those_of_upstream",)),
}

NEED_A_GPU = {
    37: "the race test: 250 backward passes with dropout must agree, which only threads of a GPU can get wrong",
}

# The marked tests check the values; these parts of the cases show only on a GPU.
PARTLY = {
    19: "that no log-sum-exp is written out of bounds needs compute-sanitizer on the same test",
    23: "the accumulator of dQ that must be cleared exists in the CUDA kernels alone; the same test covers it there",
}
