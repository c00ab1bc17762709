// Where the values to be encoded come from, and where goes what encoding loses.
//
//   gradient   v = gradient + factor * residual_in;   residual_out = v - decoded
//   delta      v = now - sent;                        sent = sent + decoded
#pragma once

#include "squares.inc.h"

namespace zps::ZPS_TARGET {

struct Flow {
  /// Fills v, and adds the squares of gradient or delta to the lanes.
  void (*load)(const EncodeCall&, uint64_t at, std::size_t n, float* v, double* lanes);
  /// Accounts for n elements of which `decoded` was sent.
  void (*settle)(const EncodeCall&, uint64_t at, std::size_t n, const float* v,
                 const float* decoded);
  /// Accounts for n elements of which nothing was sent,
  void (*keep)(const EncodeCall&, uint64_t at, std::size_t n, const float* v);
  /// and then for one of them of which `decoded` was.
  void (*patch)(const EncodeCall&, uint64_t at, float v, float decoded);
};

/// Calls value(i) for every element in lanes: the value to be squared.
template <class Value>
ZPS_HD void sum_squares(std::size_t n, double* given, const Value& value) {
  double lanes[kLanes];  // a local: the compiler keeps it in registers
  for (std::size_t k = 0; k < kLanes; ++k) lanes[k] = given[k];
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (std::size_t k = 0; k < kLanes; ++k) {
      const double one = value(i + k);
      lanes[k] += one * one;
    }
  }
  for (std::size_t k = 0; i < n; ++i, ++k) {
    const double one = value(i);
    lanes[k] += one * one;
  }
  for (std::size_t k = 0; k < kLanes; ++k) given[k] = lanes[k];
}

template <class Format, bool Feedback>
void load_gradient(const EncodeCall& call, uint64_t at, std::size_t n, float* __restrict v,
                   double* lanes) {
  const auto* __restrict gradient = static_cast<const typename Format::Stored*>(call.source) + at;
  const float* __restrict residual = Feedback ? call.residual_in + at : nullptr;
  const float factor = call.residual_factor;
  sum_squares(n, lanes, [=](std::size_t i) {
    const float one = Format::load(gradient[i]);
    v[i] = Feedback ? one + factor * residual[i] : one;
    return one;
  });
}

inline void settle_gradient(const EncodeCall& call, uint64_t at, std::size_t n,
                            const float* __restrict v, const float* __restrict decoded) {
  if (call.residual_out == nullptr) return;
  float* __restrict residual = call.residual_out + at;
  for (std::size_t i = 0; i < n; ++i) residual[i] = v[i] - decoded[i];
}

inline void keep_gradient(const EncodeCall& call, uint64_t at, std::size_t n,
                          const float* __restrict v) {
  if (call.residual_out == nullptr) return;
  float* __restrict residual = call.residual_out + at;
  for (std::size_t i = 0; i < n; ++i) residual[i] = v[i];
}

inline void patch_gradient(const EncodeCall& call, uint64_t at, float v, float decoded) {
  if (call.residual_out != nullptr) call.residual_out[at] = v - decoded;
}

template <class Format>
void load_delta(const EncodeCall& call, uint64_t at, std::size_t n, float* __restrict v,
                double* lanes) {
  const auto* __restrict now = static_cast<const typename Format::Stored*>(call.source) + at;
  const auto* __restrict sent = static_cast<const typename Format::Stored*>(call.sent) + at;
  sum_squares(n, lanes, [=](std::size_t i) {
    v[i] = Format::load(now[i]) - Format::load(sent[i]);
    return v[i];
  });
}

/// As decode does on the other side, so that both hold the same bits.
template <class Format>
void settle_delta(const EncodeCall& call, uint64_t at, std::size_t n, const float*,
                  const float* __restrict decoded) {
  auto* __restrict sent = static_cast<typename Format::Stored*>(call.sent) + at;
  for (std::size_t i = 0; i < n; ++i) sent[i] = Format::store(Format::load(sent[i]) + decoded[i]);
}

/// Adding 0, as decode does: it makes -0 to 0.
template <class Format>
void keep_delta(const EncodeCall& call, uint64_t at, std::size_t n, const float*) {
  auto* __restrict sent = static_cast<typename Format::Stored*>(call.sent) + at;
  for (std::size_t i = 0; i < n; ++i) sent[i] = Format::store(Format::load(sent[i]) + 0.0f);
}

template <class Format>
void patch_delta(const EncodeCall& call, uint64_t at, float, float decoded) {
  settle_delta<Format>(call, at, 1, nullptr, &decoded);
}

inline Flow flow_of(const EncodeCall& call) {
  return with_format(call.dtype, [&](auto format) -> Flow {
    using Format = decltype(format);
    if (call.sent != nullptr) {
      return {load_delta<Format>, settle_delta<Format>, keep_delta<Format>, patch_delta<Format>};
    }
    return {call.residual_in != nullptr ? load_gradient<Format, true>
                                        : load_gradient<Format, false>,
            settle_gradient, keep_gradient, patch_gradient};
  });
}

/// Calls visit(flow, at, n, v) for every unit, a power of two of at most kTile elements, and returns
/// the sum of squares, added tile by tile as copy does.
template <class Visit>
double for_units(const EncodeCall& call, std::size_t unit, const Visit& visit) {
  alignas(64) float v[kTile];
  double total = 0.0;
  double lanes[kLanes] = {};
  const Flow flow = flow_of(call);
  const uint64_t end = call.encoding.n;
  for (uint64_t at = 0; at < end; at += unit) {
    const std::size_t n = end - at < unit ? end - at : unit;
    flow.load(call, at, n, v, lanes);
    visit(flow, at, n, v);
    if ((at + n) % kTile == 0 || at + n == end) {
      total += sum_of(lanes);
      for (double& lane : lanes) lane = 0.0;
    }
  }
  return total;
}

}  // namespace zps::ZPS_TARGET
