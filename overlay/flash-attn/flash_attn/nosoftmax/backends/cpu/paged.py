"""Read and write KV caches that are kept in pages: page p of a sequence is row block_table[p] of the
cache."""

import torch


def gather_pages(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """Copy the first `length` rows of a sequence, (length, nheads_k, head_dim), from its pages.

    cache: (num_pages, page_size, nheads_k, head_dim); table: int32 (pages,). Only the pages needed are read.
    """
    needed = -(-length // cache.shape[1])
    return cache[table[:needed].long()].flatten(0, 1)[:length]


def write_pages(cache: torch.Tensor, table: torch.Tensor, start: int, rows: torch.Tensor) -> None:
    """Write rows (n, nheads_k, head_dim) at the positions start, start + 1, … of a sequence, in place."""
    position = torch.arange(start, start + rows.shape[0], device="cpu")
    page_size = cache.shape[1]
    cache[table[position // page_size].long(), position % page_size] = rows
