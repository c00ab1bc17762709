// topk: the largest magnitudes, in index order. Source: Lin et al., Deep Gradient Compression (2018).
#pragma once

#include "codec/cast.h"
#include "optim/target.h"

namespace zps::ZPS_TARGET {

constexpr uint32_t kTileShift = 12;  // of the tiles that indices count within

/// What magnitudes are compared by: bits of floats rise with their size. A NaN is the largest.
ZPS_HD uint32_t size_of_value(float value) { return bits_of(value) & 0x7fffffffu; }

}  // namespace zps::ZPS_TARGET
