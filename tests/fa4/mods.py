"""Define a score_mod, its derivative and two mask_mods, as a user of flash_attn.cute would."""


def square(score, batch_idx, head_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
    return score * score


def square_bwd(grad, score, batch_idx, head_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
    return grad * (score + score)


def even_distance(batch_idx, head_idx, q_idx, kv_idx, seqlen_info=None, aux_tensors=None):
    return (q_idx + kv_idx) % 2 == 0


def causal_with_gaps(batch_idx, head_idx, q_idx, kv_idx, seqlen_info=None, aux_tensors=None):
    """No query sees the second block of keys, and the third block of queries sees no key."""
    return (kv_idx <= q_idx) & ((kv_idx < 128) | (kv_idx >= 256)) & ((q_idx < 256) | (q_idx >= 384))
