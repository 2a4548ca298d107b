"""Attention without softmax for the CuTe-DSL kernels on Hopper; score_function.py states what it computes.

    public.py      flash_attn_func and flash_attn_varlen_func with use_softmax=False
    checks.py      what these kernels serve, and the errors that say so before anything is launched
    ops.py         custom operators, for torch.compile
    launch.py      one forward and one backward through upstream's host code
    formulas.py    the activations and their derivatives, as formulas for kernel and host
    score_mods.py  the same as score_mods of the kernels
    marker.py      how a score_mod tells the kernels that there is no softmax
    kernel.py      device code behind the hooks in upstream's kernels
    plan.py        repeats the launches of an earlier call
    progress.py    says that a kernel is being compiled

Nothing is imported here: checks.py must work where nvidia-cutlass-dsl is missing.
"""
