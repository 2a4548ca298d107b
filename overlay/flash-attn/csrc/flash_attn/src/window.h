// Defines windows without softmax, for any lengths: query i is aligned with key c = i + seqlen_k - seqlen_q and sees
// the keys from c - left to c + right. A negative side is open.

#pragma once

#include "namespace_config.h"

namespace FLASH_NAMESPACE {

// Opens the sides that hide no key of any sequence up to these lengths. An open right side beside a closed left side
// gets a number that hides nothing. Upstream's rules, which depend on the number of keys alone, then change only an
// open left side, to max_seqlen_k. `stays_windowed`: a call with a window keeps one, even if it hides nothing.
inline void fit_window(int &left, int &right, const int max_seqlen_q, const int max_seqlen_k,
                       const bool stays_windowed = false) {
    const bool was_windowed = left >= 0 || right >= 0;
    if (left >= max_seqlen_k - 1) { left = -1; }
    if (right >= max_seqlen_q - 1) { right = -1; }
    if (stays_windowed && was_windowed && left < 0 && right < 0) { left = max_seqlen_k; }
    if (left >= 0 && right < 0) { right = max_seqlen_q; }
}

}  // namespace FLASH_NAMESPACE
