"""Define the rows of the GPU benchmark, which gpu_vs_softmax.py writes and gpu_tables.py reads, and their
arithmetic.

A row is a Case, as a dict, with

    ms             side -> median time of one call in milliseconds; sides are SOFTMAX, NO_SOFTMAX,
                   NO_SOFTMAX_KERNEL
    skipped        side -> why it was not timed, from the error message
    finite         whether no side gave NaN or Inf
    ratio          time with softmax / time without: above 1 where use_softmax=False is faster; None if a side
                   is missing
    tflops         side -> TFLOP/s (dense and activations rows)
    bandwidth      side -> share of the copy bandwidth measured in the same run (decode rows)
    backward_by    how backward runs without softmax when nothing is forced (backward rows)

The rows of the memory part are a Case, a side, why it was skipped, and the bytes of
gpu_cases.training_step_memory.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

PARTS = ("dense", "activations", "features", "decode", "memory")

SOFTMAX = "softmax"
NO_SOFTMAX = "no_softmax"  # use_softmax=False; backward as the package chooses
NO_SOFTMAX_KERNEL = "no_softmax_kernel"  # the same with FLASH_ATTENTION_NOSOFTMAX_BACKWARD=kernel

FORWARD, BACKWARD, DECODE = "forward", "backward", "decode"
# times forward's: five matrix products against two, as in upstream's benchmarks/benchmark_flash_attention.py
BACKWARD_FLOPS = 2.5


@dataclass(frozen=True)
class Case:
    """The shape and options of one row. seqlen is that of queries and keys, or the context of a decode
    step.
    """

    name: str
    direction: str
    batch: int
    seqlen: int
    nheads: int
    nheads_k: int
    head_dim: int
    causal: bool = False

    @classmethod
    def of(cls, row: dict) -> Case:
        """The case in a row."""
        return cls(**{f.name: row[f.name] for f in fields(cls)})

    def __str__(self) -> str:
        mask = "" if self.direction == DECODE else " causal" if self.causal else " full"
        return (
            f"{self.name}{mask} {self.direction}, head_dim {self.head_dim}, batch {self.batch}, seqlen "
            f"{self.seqlen}"
        )


def attention_flops(case: Case) -> float:
    """Floating point operations of one call, by the field's rule (upstream's benchmark_flash_attention.py).

    4 * seqlen**2 * head_dim * nheads * batch, half of it when causal, 2.5 times that for backward.
    """
    forward = 4 * case.batch * case.seqlen**2 * case.nheads * case.head_dim / (2 if case.causal else 1)
    return forward * BACKWARD_FLOPS if case.direction == BACKWARD else forward


def tera_per_second(amount: float, ms: float) -> float:
    """``amount`` (operations or bytes) in ``ms`` milliseconds, in 1e12 a second."""
    return amount / ms * 1e3 / 1e12


def kv_bytes(case: Case, element_size: int) -> int:
    """Bytes of K and V that one decode step reads."""
    return 2 * case.batch * case.seqlen * case.nheads_k * case.head_dim * element_size


def ratio(ms: dict[str, float]) -> float | None:
    """Time with softmax / time without, or None where one of the two was not timed."""
    return ms[SOFTMAX] / ms[NO_SOFTMAX] if SOFTMAX in ms and NO_SOFTMAX in ms else None
