// onebit and nearest ternary: signs, and the mean magnitude of a block.
// Source: Seide et al., 1-Bit Stochastic Gradient Descent (2014), and Bernstein et al., signSGD with
// Majority Vote (2019); Li and Liu, Ternary Weight Networks (2016) for threshold and scale.
#pragma once

#include "codec/uniform.h"

namespace zps::ZPS_TARGET {

struct Onebit {
  static ZPS_HD Quantised quantise(float v, const Scale& scale, uint32_t) {
    const bool negative = v < 0.0f;
    return {static_cast<uint8_t>(negative ? 1 : 0), negative ? -scale.step : scale.step};
  }

  /// A bit as a factor of the scale.
  template <class Int>
  static ZPS_HD Int level(Int code) {
    return 1 - 2 * code;
  }
};

struct Ternary {
  /// Smaller magnitudes become 0: this share of the mean loses least for a normal distribution.
  static constexpr float kThreshold = 0.7f;

  static ZPS_HD Quantised quantise(float v, const Scale& scale, uint32_t) {
    const bool sent = fabsf(v) > scale.threshold;
    const float value = v < 0.0f ? -scale.step : scale.step;
    const int32_t level = v < 0.0f ? -1 : 1;
    return {TernaryCode::of(sent ? level : 0), sent ? value : 0.0f};
  }
};

}  // namespace zps::ZPS_TARGET
