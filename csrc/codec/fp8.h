// float8 e4m3fn with a scale a block: 4 bits of exponent, 3 of mantissa, no infinity.
// Source: Micikevicius et al., FP8 Formats for Deep Learning (2022).
#pragma once

#include "codec/uniform.h"

namespace zps::ZPS_TARGET {

struct E4m3 {
  static constexpr float kMost = 448.0f;
  static constexpr uint32_t kMostCode = 0x7eu;         // 0x7f is NaN
  static constexpr uint32_t kNormal = 121u << 23;      // 2**-6, the smallest normal number
  static constexpr uint32_t kExponents = 120u << 23;   // between the two biases

  static ZPS_HD float load(uint32_t code) {
    const uint32_t magnitude = (code & 0x7fu) << 20;
    // As in half.h: subnormals are multiples of 2**-9.
    const float subnormal = float_of(magnitude + kNormal) - float_of(kNormal);
    const uint32_t finite = magnitude < (8u << 20) ? bits_of(subnormal) : magnitude + kExponents;
    const uint32_t all = magnitude == (0x7fu << 20) ? 0x7fc00000u : finite;
    return float_of((code & 0x80u) << 24 | all);
  }

  static ZPS_HD uint32_t nearest(uint32_t magnitude, uint32_t) {
    const uint32_t odd = magnitude >> 20 & 1u;
    const uint32_t normal = (magnitude - kExponents + 0x7ffffu + odd) >> 20;
    const uint32_t subnormal = bits_of(float_of(magnitude) + 16384.0f) - bits_of(16384.0f);
    return magnitude < kNormal ? subnormal : normal;
  }

  /// Adds 20 random bits below the last that stays. Subnormals become fixed point with as many.
  static ZPS_HD uint32_t stochastic(uint32_t magnitude, uint32_t random) {
    const uint32_t subnormal = bits_of(float_of(magnitude) + float_of(kNormal)) - kNormal;
    const uint32_t fine = magnitude < kNormal ? subnormal : magnitude - kExponents;
    return (fine + (random >> 12)) >> 20;
  }
};

template <bool IsStochastic>
struct Fp8 {
  static constexpr float kMost = E4m3::kMost;

  static ZPS_HD Quantised quantise(float v, const Scale& scale, uint32_t random) {
    const uint32_t bits = bits_of(v * scale.inverse);
    const uint32_t sign = bits >> 24 & 0x80u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t rounded = IsStochastic ? E4m3::stochastic(magnitude, random)
                                          : E4m3::nearest(magnitude, random);
    const uint32_t code = sign | (rounded < E4m3::kMostCode ? rounded : E4m3::kMostCode);
    return {static_cast<uint8_t>(code), E4m3::load(code) * scale.step};
  }
};

}  // namespace zps::ZPS_TARGET
