"""Test which of upstream's cases are left out, and on which files a result depends."""

from __future__ import annotations

import pytest

from fapatch.base.errors import UsageError
from fapatch.upstream import upstream_test


@pytest.mark.parametrize(
    "function, parameters, too_much",
    [
        ("test_flash_attn_output", {"seqlen_q": "113", "seqlen_k": "203"}, False),
        ("test_flash_attn_output", {"seqlen_q": "1024", "seqlen_k": "1024"}, True),
        ("test_flash_attn_qkvpacked", {"seqlen": "200"}, False),
        ("test_flash_attn_kvcache", {"seqlen_q": "1", "seqlen_k": "131072"}, True),
        ("test_flash_attn_race_condition", {"seqlen_q": "1", "seqlen_k": "239"}, True),
        ("test_flash_attn_bwd_varlen_overflow", {}, False),
        ("test_of_a_later_release", {"seqlen_q": "64", "seqlen_k": "64"}, False),
    ],
)
def test_what_is_too_long_for_the_cpu(function, parameters, too_much):
    assert upstream_test.costs_too_much(function, parameters) is too_much


@pytest.mark.parametrize(
    "parameters, skips",
    [
        ({}, False),
        ({"softcap": "50.0", "dropout_p": "0.0"}, False),
        ({"softcap": "50.0", "dropout_p": "0.17"}, True),
        ({"new_kv": "False", "rotary_fraction": "0.0"}, False),
        ({"new_kv": "False", "rotary_fraction": "0.5"}, True),
        ({"has_leftpad": "True", "paged_kv_block_size": "None"}, False),
        ({"has_leftpad": "True", "paged_kv_block_size": "256"}, True),
        ({"has_leftpad": "False", "paged_kv_block_size": "256"}, False),
    ],
)
def test_what_upstream_skips_itself(parameters, skips):
    assert upstream_test.skips_itself("test_x", parameters) is skips


def test_a_result_is_tied_to_the_package_and_the_tests(tmp_path):
    package, test = tmp_path / "flash_attn", tmp_path / "test_x.py"
    package.mkdir()
    (package / "a.py").write_text("1")
    test.write_text("1")
    before = upstream_test.fingerprint(package, test)
    assert upstream_test.fingerprint(package, test) == before
    (tmp_path / "flash_attn_2_cuda.cpython-311.so").write_text("kernel")
    with_extension = upstream_test.fingerprint(package, test)
    test.write_text("2")
    with_test = upstream_test.fingerprint(package, test)
    (package / "a.py").write_text("2")
    assert len({before, with_extension, with_test, upstream_test.fingerprint(package, test)}) == 4


@pytest.mark.parametrize("text", ["", "x", "-1", "2.5", "nan"])
def test_a_fraction_is_a_number_from_0_to_1(text):
    with pytest.raises(UsageError, match="FRACTION="):
        upstream_test._number(text, "FRACTION", float, 0, 1, "0.5")
