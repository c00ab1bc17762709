// int8, int4 and stochastic ternary: the multiples of one step a block.
// Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2022), section 2.1; Alistarh
// et al., QSGD (2017) for the stochastic rounding; Wen et al., TernGrad (2017) for one level.
#pragma once

#include "codec/hash.h"

namespace zps::ZPS_TARGET {

/// What the elements of a block share. `step` is what the piece stores.
struct Scale {
  float step, inverse, threshold;
};

/// A block whose largest magnitude is below this is encoded as zeros: the inverse of its step would
/// be infinite, and nothing of use is that small.
constexpr uint32_t kTinyBits = 27u << 23;  // 2**-100

ZPS_HD Scale scale_to(float most, uint32_t absmax_bits) {
  const float absmax = float_of(absmax_bits);
  const bool tiny = absmax_bits < kTinyBits;
  return {tiny ? 0.0f : absmax / most, tiny ? 0.0f : most / absmax, 0.0f};
}

struct Quantised {
  uint8_t code;
  float value;  // what the code decodes to
};

// A code's level is the factor of the step that it stands for; Int is int32_t or a vector of them.

struct Int8Code {
  static constexpr int32_t kLevels = 127;
  static ZPS_HD uint8_t of(int32_t level) { return static_cast<uint8_t>(level); }
  template <class Int>
  static ZPS_HD Int level(Int code) {
    return (code ^ 0x80) - 0x80;
  }
};

struct Int4Code {
  static constexpr int32_t kLevels = 7;
  static ZPS_HD uint8_t of(int32_t level) { return static_cast<uint8_t>(level + 8); }
  template <class Int>
  static ZPS_HD Int level(Int code) {
    return code - 8;
  }
};

struct TernaryCode {
  static constexpr int32_t kLevels = 1;
  static ZPS_HD uint8_t of(int32_t level) {
    return static_cast<uint8_t>((level & 1) + (level < 0 ? 1 : 0));
  }
  /// 3, which nobody writes, is 0.
  template <class Int>
  static ZPS_HD Int level(Int code) {
    return (code & 1) - (code >> 1);
  }
};

template <class Code>
struct Nearest {
  static constexpr float kMost = Code::kLevels;

  static ZPS_HD Quantised quantise(float v, const Scale& scale, uint32_t) {
    // 1.5 * 2**23 has a unit in the last place of 1: adding it rounds, to nearest even.
    const float magic = 12582912.0f;
    const float rounded = v * scale.inverse + magic;
    const int32_t level = static_cast<int32_t>(bits_of(rounded) - bits_of(magic));
    return {Code::of(level), (rounded - magic) * scale.step};
  }
};

/// Rounds up with the probability of the fraction, so that the mean of many is the value itself.
/// What is a whole level stays it.
template <class Code>
struct Stochastic {
  static constexpr float kMost = Code::kLevels;

  static ZPS_HD Quantised quantise(float v, const Scale& scale, uint32_t random) {
    const float size = fabsf(v) * scale.inverse;
    const float held = size < kMost ? size : kMost;  // the inverse is rounded; and no NaN
    const int32_t below = static_cast<int32_t>(held);
    const float fraction = held - static_cast<float>(below);
    const int32_t reached = below + (unit(random) < fraction ? 1 : 0);
    const int32_t level = v < 0.0f ? -reached : reached;
    return {Code::of(level), static_cast<float>(level) * scale.step};
  }
};

}  // namespace zps::ZPS_TARGET
