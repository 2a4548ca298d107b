"""Attention without softmax for the CuTe-DSL kernels on Hopper.

    score.py, call.py, checks.py, flops.py, revision.py  shared with flash_attn/nosoftmax of the other wheel;
                                                         score.py states the contract
    public.py      flash_attn_func and flash_attn_varlen_func with use_softmax=False
    serves.py      says which calls these kernels take, and why not the others, before any launch
    ops.py         a call with its derivative, as autograd.Function and as operators for torch.compile
    hopper.py      a call outside autograd, of these functions or of flash_attn's
    launch.py      one forward and one backward through upstream's host code
    formulas.py    formulas of the activations and their derivatives, for kernel and host
    score_mods.py  the formulas as score_mods of the kernels
    marker.py      marks a score_mod, to tell the kernels that there is no softmax
    kernel.py      device code behind the hooks in upstream's kernels
    masked.py      the same for a mask of flash_attn.masks, and for a window with a diagonal
    ranges.py      the blocks that a tile visits under a mask, for kernel and host
    grid.py        the place of a tile in a batch of packed sequences, in plain integers
    schedule.py    the same in the kernels, and how many tiles share a multiprocessor
    queries.py     keeps queries of a tile in registers
    registers.py   the integers of a kernel, for ranges.py
    hulls.py       finds the bounds of blocks under intervals
    plan.py        repeats the launches of an earlier call
    slack.py       zeroes rows that belong to no sequence
    largest.py     finds the largest given factor of each sequence
    progress.py    tells the user that a kernel is being compiled

Nothing is imported here: serves.py must work where nvidia-cutlass-dsl is missing.
"""
