// The tile loops, compiled once per target: kernels_<target>.cpp defines ZPS_TARGET and includes
// this. Loops are plain and vectorised by the compiler; contraction is off, so every target rounds
// alike and results are equal bit for bit.

#include "codec/half.h"
#include "kernels.h"
#include "optim/rules.h"

namespace zps::ZPS_TARGET {

/// Slots read in one pass. More streams at once keep more cache misses in flight.
constexpr std::uint32_t kFanIn = 4;

template <class Format, int Count, bool Scaled, bool Continued>
void gather(const void* const* slots, const float* scales, std::uint64_t at, std::size_t n,
            float* __restrict grad) {
  const typename Format::Stored* source[Count];
  float scale[Count];
  for (int k = 0; k < Count; ++k) {
    source[k] = static_cast<const typename Format::Stored*>(slots[k]) + at;
    scale[k] = Scaled ? scales[k] : 1.0f;
  }
  for (std::size_t i = 0; i < n; ++i) {
    float sum = Continued ? grad[i] : 0.0f;
    for (int k = 0; k < Count; ++k) {
      float value = Format::load(source[k][i]);
      if (Scaled) value *= scale[k];
      sum = k == 0 && !Continued ? value : sum + value;
    }
    grad[i] = sum;
  }
}

template <class Format, bool Scaled, bool Continued>
void gather_some(std::uint32_t count, const void* const* slots, const float* scales,
                 std::uint64_t at, std::size_t n, float* grad) {
  switch (count) {
    case 1: return gather<Format, 1, Scaled, Continued>(slots, scales, at, n, grad);
    case 2: return gather<Format, 2, Scaled, Continued>(slots, scales, at, n, grad);
    case 3: return gather<Format, 3, Scaled, Continued>(slots, scales, at, n, grad);
    default: return gather<Format, 4, Scaled, Continued>(slots, scales, at, n, grad);
  }
}

/// Contributions are added in list order, whatever the pass they fall in.
template <class Format, bool Scaled>
void gather_all(const Work& work, std::uint64_t at, std::size_t n, float* grad) {
  std::uint32_t done = work.slot_count < kFanIn ? work.slot_count : kFanIn;
  gather_some<Format, Scaled, false>(done, work.slots, work.scales, at, n, grad);
  while (done < work.slot_count) {
    const std::uint32_t left = work.slot_count - done;
    const std::uint32_t count = left < kFanIn ? left : kFanIn;
    gather_some<Format, Scaled, true>(count, work.slots + done,
                                      Scaled ? work.scales + done : nullptr, at, n, grad);
    done += count;
  }
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

template <class Format>
void average(const Work& work, std::uint64_t at, std::size_t n, float* __restrict grad) {
  work.scales != nullptr ? gather_all<Format, true>(work, at, n, grad)
                         : gather_all<Format, false>(work, at, n, grad);
  const float divisor = work.divisor;
  const float coef = work.coef;
  if (divisor != 1.0f) {
    for (std::size_t i = 0; i < n; ++i) grad[i] /= divisor;
  }
  if (coef != 1.0f) {
    for (std::size_t i = 0; i < n; ++i) grad[i] *= coef;
  }
  if (work.base != nullptr) compensate<Format>(work, at, n, grad);
}

template <class Format>
void publish(const float* __restrict master, void* weights, std::size_t n) {
  auto* __restrict out = static_cast<typename Format::Stored*>(weights);
  for (std::size_t i = 0; i < n; ++i) out[i] = Format::store(master[i]);
}

template <class Update>
void update_tile(const Update& given, const Work& work, std::uint64_t at, std::size_t n,
                 const float* __restrict grad) {
  const Update update = given;  // a copy: no store of the loop can change its scalars
  constexpr unsigned kUsed = Update::kStates;
  float* __restrict weights = work.master + at;
  float* __restrict first = work.states[0] + (kUsed & 1 ? at : 0);
  float* __restrict second = work.states[1] + (kUsed & 2 ? at : 0);
  float* __restrict third = work.states[2] + (kUsed & 4 ? at : 0);
  for (std::size_t i = 0; i < n; ++i) {
    float weight = weights[i];
    float state[3];
    if constexpr (kUsed & 1) state[0] = first[i];
    if constexpr (kUsed & 2) state[1] = second[i];
    if constexpr (kUsed & 4) state[2] = third[i];
    update(weight, grad[i], state);
    weights[i] = weight;
    if constexpr (kUsed & 1) first[i] = state[0];
    if constexpr (kUsed & 2) second[i] = state[1];
    if constexpr (kUsed & 4) third[i] = state[2];
  }
}

template <class Format>
struct ApplyTiles {
  const Work& work;
  std::uint64_t begin, end;

  template <class Update>
  void operator()(const Update& update) const {
    alignas(64) float grad[kTile];
    for (std::uint64_t at = begin; at < end; at += kTile) {
      const std::size_t n = end - at < kTile ? end - at : kTile;
      average<Format>(work, at, n, grad);
      update_tile(update, work, at, n, grad);
      if (work.dtype != Dtype::kF32) {
        publish<Format>(work.master + at, static_cast<typename Format::Stored*>(work.weights) + at,
                        n);
      }
    }
  }
};

/// Calls visit with the format of dtype.
template <class Visit>
auto with_format(Dtype dtype, const Visit& visit) {
  switch (dtype) {
    case Dtype::kBf16: return visit(Bf16{});
    case Dtype::kF16: return visit(F16{});
    default: return visit(F32{});
  }
}

void apply(const Work& work, const Segment& segment, std::uint64_t begin, std::uint64_t end) {
  const double* hyper = work.hypers + std::uint64_t{segment.group} * work.hyper_count;
  const std::int64_t step = work.steps[segment.param];
  with_format(work.dtype, [&](auto format) {
    with_update(work.rule, hyper, step, work.lr_factor,
                ApplyTiles<decltype(format)>{work, begin, end});
  });
}

void reduce(const Work& work, std::uint64_t begin, std::uint64_t end, float* out) {
  with_format(work.dtype, [&](auto format) {
    for (std::uint64_t at = begin; at < end; at += kTile) {
      const std::size_t n = end - at < kTile ? end - at : kTile;
      average<decltype(format)>(work, at, n, out + at);
    }
  });
}

/// Lanes of a sum of squares: a fixed number, so that its value does not depend on the target.
constexpr std::size_t kLanes = 16;

/// Copies when Copy, and adds the squares of at most one tile.
template <class Format, bool Copy>
double sum_sq(const typename Format::Stored* source, typename Format::Stored* __restrict out,
              std::size_t n) {
  double lane[kLanes] = {};
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (std::size_t k = 0; k < kLanes; ++k) {
      const double value = Format::load(source[i + k]);
      lane[k] += value * value;
      if (Copy) out[i + k] = source[i + k];
    }
  }
  for (std::size_t k = 0; i < n; ++i, ++k) {
    const double value = Format::load(source[i]);
    lane[k] += value * value;
    if (Copy) out[i] = source[i];
  }
  for (std::size_t width = kLanes / 2; width > 0; width /= 2) {
    for (std::size_t k = 0; k < width; ++k) lane[k] += lane[k + width];
  }
  return lane[0];
}

double norm_sq(const Work& work, std::uint64_t begin, std::uint64_t end) {
  alignas(64) float grad[kTile];
  const std::size_t n = end - begin;
  with_format(work.dtype,
              [&](auto format) { average<decltype(format)>(work, begin, n, grad); });
  return sum_sq<F32, false>(grad, nullptr, n);
}

template <class Format, bool Copy>
double encode_as(const void* source, void* out, std::uint64_t n) {
  const auto* from = static_cast<const typename Format::Stored*>(source);
  auto* to = static_cast<typename Format::Stored*>(out);
  double total = 0.0;
  for (std::uint64_t at = 0; at < n; at += kTile) {
    const std::size_t count = n - at < kTile ? n - at : kTile;
    total += sum_sq<Format, Copy>(from + at, Copy ? to + at : nullptr, count);
  }
  return total;
}

double encode(const void* source, void* out, std::uint64_t n, Dtype dtype) {
  return with_format(dtype, [&](auto format) {
    using Format = decltype(format);
    return out != nullptr ? encode_as<Format, true>(source, out, n)
                          : encode_as<Format, false>(source, nullptr, n);
  });
}

const Kernels kernels = {apply, reduce, norm_sq, encode};

}  // namespace zps::ZPS_TARGET
