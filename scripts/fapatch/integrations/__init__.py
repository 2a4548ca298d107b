"""Tests with packages that use flash_attn, in environments of their own."""
