"""Comparison of machine code: encodings by architecture and mangled name, whatever the columns of the listing."""

import compare_stock_kernels as compare

LISTING = """
Fatbin elf code:
================
arch = sm_90
code version = [1,8]
\tcode for sm_90
\t\tFunction : _Z1fv
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;      /* 0x00000a00ff017b82 */
                                                               /* 0x000fe20000000800 */
\t\tFunction : _Z1gv
        /*0000*/                   EXIT ;                      /* 0x000000000000794d */
                                                               /* 0x000fea0003800000 */
"""


def test_encodings_by_name():
    assert compare.parse_listing(LISTING) == {
        ("sm_90", "_Z1fv"): ("0x00000a00ff017b82", "0x000fe20000000800"),
        ("sm_90", "_Z1gv"): ("0x000000000000794d", "0x000fea0003800000"),
    }


def test_columns_do_not_matter_and_a_changed_word_does():
    assert compare.parse_listing(LISTING.replace("      /*", "  /*")) == compare.parse_listing(LISTING)
    assert compare.parse_listing(LISTING.replace("7b82", "7b83")) != compare.parse_listing(LISTING)
