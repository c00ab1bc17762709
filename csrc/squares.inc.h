// Sums of squares, and the pass over a gradient that is not coded.
#pragma once

#include "codec/half.h"
#include "kernels.h"

namespace zps::ZPS_TARGET {

/// Calls visit with the format of dtype.
template <class Visit>
auto with_format(Dtype dtype, const Visit& visit) {
  switch (dtype) {
    case Dtype::kBf16: return visit(Bf16{});
    case Dtype::kF16: return visit(F16{});
    default: return visit(F32{});
  }
}

/// Lanes of a sum of squares: a fixed number, so that its value does not depend on the target.
constexpr std::size_t kLanes = 16;

/// Adds the squares of n elements to the lanes, and copies them to out if Copy.
template <class Format, bool Copy>
void add_squares(const typename Format::Stored* source, std::size_t n, double* __restrict lanes,
                 typename Format::Stored* __restrict out) {
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (std::size_t k = 0; k < kLanes; ++k) {
      const double value = Format::load(source[i + k]);
      lanes[k] += value * value;
      if (Copy) out[i + k] = source[i + k];
    }
  }
  for (std::size_t k = 0; i < n; ++i, ++k) {
    const double value = Format::load(source[i]);
    lanes[k] += value * value;
    if (Copy) out[i] = source[i];
  }
}

template <class Real>
Real sum_of(Real* lanes) {
  for (std::size_t width = kLanes / 2; width > 0; width /= 2) {
    for (std::size_t k = 0; k < width; ++k) lanes[k] += lanes[k + width];
  }
  return lanes[0];
}

inline double copy(const void* source, void* out, std::uint64_t n, Dtype dtype) {
  return with_format(dtype, [&](auto format) {
    using Format = decltype(format);
    const auto* from = static_cast<const typename Format::Stored*>(source);
    auto* to = static_cast<typename Format::Stored*>(out);
    double total = 0.0;
    for (std::uint64_t at = 0; at < n; at += kTile) {
      const std::size_t count = n - at < kTile ? n - at : kTile;
      double lanes[kLanes] = {};
      to != nullptr ? add_squares<Format, true>(from + at, count, lanes, to + at)
                    : add_squares<Format, false>(from + at, count, lanes, nullptr);
      total += sum_of(lanes);
    }
    return total;
  });
}

}  // namespace zps::ZPS_TARGET
