"""Draw docs/hstu_masks.png: which keys each row sees under some masks of flash_attn.masks.HSTU."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from flash_attn.masks import HSTU
from flash_attn.nosoftmax.intervals import HSTUSequence

TARGET = Path(__file__).resolve().parents[1] / "docs" / "hstu_masks.png"
SEQLEN = 24
MASKS = {
    "num_targets=6": HSTU(6),
    "…, num_contexts=4": HSTU(6, 4),
    "…, max_attn_len=6": HSTU(6, 4, 6),
    "…, min_full_attn_seq_len=3": HSTU(6, 4, 6, 3),
    "num_targets=6, target_group_size=2": HSTU(6, target_group_size=2),
}


def visible(mask: HSTU) -> torch.Tensor:
    starts, ends = HSTUSequence(SEQLEN, SEQLEN, *mask).intervals()
    key = torch.arange(SEQLEN)
    return ((key >= starts[..., None]) & (key < ends[..., None])).any(1)


def main() -> int:
    figure, axes = plt.subplots(1, len(MASKS), figsize=(14, 3.2), layout="constrained")
    for axis, (name, mask) in zip(axes, MASKS.items()):
        axis.imshow(visible(mask), cmap="Blues", vmin=0, vmax=1.4)
        for edge in (mask.num_contexts, SEQLEN - mask.num_targets):
            if edge:
                axis.axvline(edge - 0.5, color="tab:orange", linewidth=1)
                axis.axhline(edge - 0.5, color="tab:orange", linewidth=1)
        axis.set_title(name, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0].set_ylabel("query")
    for axis in axes:
        axis.set_xlabel("key")
    figure.savefig(TARGET, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
