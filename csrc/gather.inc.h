// The average of all contributions to one block, decoded if need be.
#pragma once

#include "codec/half.h"
#include "decode.inc.h"

namespace zps::ZPS_TARGET {

/// Slots read in one pass.
constexpr std::uint32_t kFanIn = 4;

template <class T>
const T* at_byte(const void* slot, std::uint64_t byte) {
  return reinterpret_cast<const T*>(static_cast<const char*>(slot) + byte);
}

/// Where a slot holds element `at` of the bucket, if its segment is not coded.
template <class Format>
std::uint64_t byte_of(const Segment& segment, std::uint64_t at) {
  return segment.encoded + (at - segment.begin) * sizeof(typename Format::Stored);
}

/// grad = (grad + sum of the slots) * factor, beginning at the first slot unless Continued.
template <class Format, int Count, bool Scaled, bool Continued>
void gather(const void* const* slots, const float* scales, float factor, std::uint64_t byte,
            std::size_t n, float* __restrict grad) {
  const typename Format::Stored* source[Count];
  float scale[Count];
  for (int k = 0; k < Count; ++k) {
    source[k] = at_byte<typename Format::Stored>(slots[k], byte);
    scale[k] = Scaled ? scales[k] : 1.0f;
  }
  for (std::size_t i = 0; i < n; ++i) {
    float sum = Continued ? grad[i] : 0.0f;
    for (int k = 0; k < Count; ++k) {
      float value = Format::load(source[k][i]);
      if (Scaled) value *= scale[k];
      sum = k == 0 && !Continued ? value : sum + value;
    }
    grad[i] = sum * factor;
  }
}

template <class Format, bool Scaled, bool Continued>
void gather_some(const void* const* slots, const float* scales, std::uint32_t count, float factor,
                 std::uint64_t byte, std::size_t n, float* grad) {
  switch (count) {
    case 1: return gather<Format, 1, Scaled, Continued>(slots, scales, factor, byte, n, grad);
    case 2: return gather<Format, 2, Scaled, Continued>(slots, scales, factor, byte, n, grad);
    case 3: return gather<Format, 3, Scaled, Continued>(slots, scales, factor, byte, n, grad);
    default: return gather<Format, 4, Scaled, Continued>(slots, scales, factor, byte, n, grad);
  }
}

/// Contributions are added in list order, whatever the pass they fall in.
template <class Format, bool Scaled>
void gather_all(const Work& work, const Segment& segment, std::uint64_t at, std::size_t n,
                float* grad) {
  const float* scales = work.scales;
  const std::uint64_t byte = byte_of<Format>(segment, at);
  for (std::uint32_t done = 0; done < work.slot_count; done += kFanIn) {
    const std::uint32_t left = work.slot_count - done;
    const bool last = left <= kFanIn;
    const std::uint32_t count = last ? left : kFanIn;
    const float factor = last ? work.factor : 1.0f;
    const void* const* slots = work.slots + done;
    done == 0 ? gather_some<Format, Scaled, false>(slots, scales, count, factor, byte, n, grad)
              : gather_some<Format, Scaled, true>(slots, scales, count, factor, byte, n, grad);
    if (Scaled) scales += count;
  }
}

inline void multiply(float factor, std::size_t n, float* __restrict grad) {
  for (std::size_t i = 0; i < n; ++i) grad[i] *= factor;
}

/// What gather_all does, for a coded segment: codecs and rules meet in scratch only.
template <bool Scaled>
void gather_coded(const Work& work, const Segment& segment, std::uint64_t at, std::size_t n,
                  float* grad) {
  const std::uint64_t first = at - segment.begin;
  for (std::uint32_t k = 0; k < work.slot_count; ++k) {
    const auto* bytes = at_byte<std::uint8_t>(work.slots[k], segment.encoded);
    const float scale = Scaled ? work.scales[k] : 1.0f;
    k == 0 ? decode_block(segment.encoding, bytes, first, n, Put<false, Scaled>{scale}, grad)
           : decode_block(segment.encoding, bytes, first, n, Put<true, Scaled>{scale}, grad);
  }
  if (const float factor = work.factor; factor != 1.0f) multiply(factor, n, grad);
}

/// Delay compensation. Source: Zheng et al., Asynchronous SGD with Delay Compensation (2017).
template <class Format>
void compensate(const Work& work, std::uint64_t at, std::size_t n, float* __restrict grad) {
  const auto* now = static_cast<const typename Format::Stored*>(work.weights) + at;
  const auto* base = static_cast<const typename Format::Stored*>(work.base) + at;
  const float lambda = work.dc_lambda;
  for (std::size_t i = 0; i < n; ++i) {
    const float moved = Format::load(now[i]) - Format::load(base[i]);
    grad[i] += lambda * grad[i] * grad[i] * moved;
  }
}

template <class Format, bool Scaled>
void gather_any(const Work& work, const Segment& segment, std::uint64_t at, std::size_t n,
                float* grad) {
  segment.encoding.kind == Kind::kNone ? gather_all<Format, Scaled>(work, segment, at, n, grad)
                                       : gather_coded<Scaled>(work, segment, at, n, grad);
}

template <class Format>
void average_into(const Work& work, const Segment& segment, std::uint64_t at, std::size_t n,
                  float* grad) {
  work.scales != nullptr ? gather_any<Format, true>(work, segment, at, n, grad)
                         : gather_any<Format, false>(work, segment, at, n, grad);
  if (const float divisor = work.divisor; divisor != 1.0f) {
    for (std::size_t i = 0; i < n; ++i) grad[i] /= divisor;
  }
  if (const float coef = work.coef; coef != 1.0f) multiply(coef, n, grad);
  if (work.base != nullptr) compensate<Format>(work, at, n, grad);
}

/// The averaged gradient of one block: in scratch, or where it already lies.
using Average = const float* (*)(const Work&, const Segment&, std::uint64_t at, std::size_t n,
                                 float* scratch);

template <class Format>
const float* average(const Work& work, const Segment& segment, std::uint64_t at, std::size_t n,
                     float* scratch) {
  average_into<Format>(work, segment, at, n, scratch);
  return scratch;
}

inline const float* only_slot(const Work& work, const Segment& segment, std::uint64_t at,
                              std::size_t, float*) {
  return at_byte<float>(work.slots[0], byte_of<F32>(segment, at));
}

inline Average choose_average(const Work& work, const Segment& segment) {
  const bool as_it_is = work.slot_count == 1 && work.scales == nullptr && work.factor == 1.0f &&
                        work.divisor == 1.0f && work.coef == 1.0f && work.base == nullptr &&
                        segment.encoding.kind == Kind::kNone;
  switch (work.dtype) {
    case Dtype::kBf16: return average<Bf16>;
    case Dtype::kF16: return average<F16>;
    default: return as_it_is ? only_slot : average<F32>;
  }
}

}  // namespace zps::ZPS_TARGET
