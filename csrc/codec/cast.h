// The codecs fp16 and bf16. What is too large for the format becomes its largest number: infinity
// would stay in the residual for ever.
#pragma once

#include "codec/half.h"

namespace zps::ZPS_TARGET {

ZPS_HD float held_within(float value, float most) {
  const float below = value > most ? most : value;
  return below < -most ? -most : below;
}

struct CastF16 {
  static ZPS_HD uint16_t store(float value) { return F16::store(held_within(value, 65504.0f)); }
  static ZPS_HD float load(uint16_t half) { return F16::load(half); }
};

struct CastBf16 {
  static ZPS_HD uint16_t store(float value) {
    return Bf16::store(held_within(value, float_of(0x7f7f0000u)));
  }
  static ZPS_HD float load(uint16_t half) { return Bf16::load(half); }
};

}  // namespace zps::ZPS_TARGET
