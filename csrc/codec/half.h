// bfloat16 and float16, branch-free so that loops over them vectorise on every target.
// Rounding is to nearest, ties to even; a NaN stays a NaN.
#pragma once

#include "optim/target.h"

namespace zps::ZPS_TARGET {

struct F32 {
  using Stored = float;
  static ZPS_HD float load(float value) { return value; }
  static ZPS_HD float store(float value) { return value; }
};

struct Bf16 {
  using Stored = uint16_t;

  static ZPS_HD float load(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

  static ZPS_HD uint16_t store(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet_nan = (bits >> 16) | 0x40u;  // rounding could carry a NaN into infinity
    return static_cast<uint16_t>(value != value ? quiet_nan : rounded);
  }
};

/// Source of the method: Fabian Giesen, float->half variants (public domain).
struct F16 {
  using Stored = uint16_t;

  static ZPS_HD float load(uint16_t half) {
    const uint32_t magnitude = (half & 0x7fffu) << 13;
    const uint32_t sign = (half & 0x8000u) << 16;
    const uint32_t normal = magnitude + ((127u - 15u) << 23);
    const uint32_t special = magnitude | 0x7f800000u;
    // A subnormal half is an integer multiple of 2**-24: give it the exponent of 2**-14, whose
    // unit in the last place matches, and subtract that again. Exact.
    const float subnormal = float_of(magnitude + (113u << 23)) - float_of(113u << 23);
    const uint32_t finite = magnitude < (0x400u << 13) ? bits_of(subnormal) : normal;
    return float_of(sign | (magnitude >= (0x7c00u << 13) ? special : finite));
  }

  static ZPS_HD uint16_t store(float value) {
    const uint32_t sign = bits_of(value) & 0x80000000u;
    const uint32_t magnitude = bits_of(value) ^ sign;
    const uint32_t odd = (magnitude >> 13) & 1u;
    const uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + odd) >> 13;
    // Adding 0.5 makes the floating-point adder round at a half's subnormal unit, 2**-24.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return static_cast<uint16_t>((sign >> 16) | (magnitude >= (143u << 23) ? special : finite));
  }
};

}  // namespace zps::ZPS_TARGET
