"""List every score function, as the options that choose it."""

from __future__ import annotations

FUNCTIONS = [
    dict(activation="identity"),
    dict(activation="relu"),
    dict(activation="relu2"),
    dict(activation="sigmoid"),
    dict(activation="sigmoid", sigmoid_bias=-1.5),
    dict(activation="sigmoid", sigmoid_bias="-log n"),
    dict(activation="silu"),
    dict(activation="gelu"),
    dict(activation="softplus"),
]
