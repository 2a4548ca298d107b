// Defines windows without softmax, for any lengths: query i is aligned with key c = i + seqlen_k - seqlen_q and sees
// the keys from c - left to c + right. A negative side is open.
//
// A diagonal aligns it with key i + diagonal. The kernels keep c, and shift both sides by the difference. A shifted side
// may be negative, so an open side is a number there.

#pragma once

#include <cstdint>
#include <limits>

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

// Beyond all keys, and its sum with a position and a length is an int.
inline constexpr int kFarSide = 1 << 30;

// Opens the sides of a call with a diagonal so that upstream's rules leave them alone: a window has no negative side. An
// open side is so far away that no shift brings it to a key.
inline void open_sides(int &left, int &right) {
    constexpr int kOpenSide = std::numeric_limits<int>::max();
    if (left < 0 && right < 0) { return; }
    if (left < 0) { left = kOpenSide; }
    if (right < 0) { right = kOpenSide; }
}

// A side counted from c, where `shift` is how much farther than c the diagonal lies on that side. The queries see the
// same keys, if those are fewer than 2^29 positions away from c.
constexpr int shifted_side(const int side, const int shift) {
    const int64_t shifted = int64_t(side) + shift;
    return int(shifted > kFarSide ? kFarSide : shifted < -kFarSide ? -kFarSide : shifted);
}

}  // namespace FLASH_NAMESPACE
