"""List lengths of packed sequences."""

RAGGED = dict(lengths_q=[7, 1, 13], lengths_k=[9, 20, 5])
EMPTY = dict(lengths_q=[4, 0, 5, 3], lengths_k=[6, 7, 0, 2])
