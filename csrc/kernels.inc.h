// The loops, compiled once per target: kernels_<target>.cpp defines ZPS_TARGET and includes this.
// They are plain and vectorised by the compiler; contraction is off, so every target rounds alike
// and results are equal bit for bit.

#include "codec/half.h"
#include "kernels.h"
#include "optim/rules.h"
#include "stream.inc.h"

namespace zps::ZPS_TARGET {

/// Elements averaged before the rule reads them: 8 cache lines of scratch. Small, so that slots,
/// weights and states are fetched side by side: with blocks of a page or more the hardware
/// prefetchers of one group of streams idle while the other runs, at up to 30 % of the bandwidth.
constexpr std::size_t kBlock = 128;

/// Slots read in one pass.
constexpr std::uint32_t kFanIn = 4;

/// grad = (grad + sum of the slots) * factor, beginning at the first slot unless Continued.
template <class Format, int Count, bool Scaled, bool Continued>
void gather(const void* const* slots, const float* scales, float factor, std::uint64_t at,
            std::size_t n, float* __restrict grad) {
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
    grad[i] = sum * factor;
  }
}

template <class Format, bool Scaled, bool Continued>
void gather_some(const void* const* slots, const float* scales, std::uint32_t count, float factor,
                 std::uint64_t at, std::size_t n, float* grad) {
  switch (count) {
    case 1: return gather<Format, 1, Scaled, Continued>(slots, scales, factor, at, n, grad);
    case 2: return gather<Format, 2, Scaled, Continued>(slots, scales, factor, at, n, grad);
    case 3: return gather<Format, 3, Scaled, Continued>(slots, scales, factor, at, n, grad);
    default: return gather<Format, 4, Scaled, Continued>(slots, scales, factor, at, n, grad);
  }
}

/// Contributions are added in list order, whatever the pass they fall in.
template <class Format, bool Scaled>
void gather_all(const Work& work, std::uint64_t at, std::size_t n, float* grad) {
  const float* scales = work.scales;
  for (std::uint32_t done = 0; done < work.slot_count; done += kFanIn) {
    const std::uint32_t left = work.slot_count - done;
    const bool last = left <= kFanIn;
    const std::uint32_t count = last ? left : kFanIn;
    const float factor = last ? work.factor : 1.0f;
    const void* const* slots = work.slots + done;
    done == 0 ? gather_some<Format, Scaled, false>(slots, scales, count, factor, at, n, grad)
              : gather_some<Format, Scaled, true>(slots, scales, count, factor, at, n, grad);
    if (Scaled) scales += count;
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
void average_into(const Work& work, std::uint64_t at, std::size_t n, float* grad) {
  work.scales != nullptr ? gather_all<Format, true>(work, at, n, grad)
                         : gather_all<Format, false>(work, at, n, grad);
  if (const float divisor = work.divisor; divisor != 1.0f) {
    for (std::size_t i = 0; i < n; ++i) grad[i] /= divisor;
  }
  if (const float coef = work.coef; coef != 1.0f) {
    for (std::size_t i = 0; i < n; ++i) grad[i] *= coef;
  }
  if (work.base != nullptr) compensate<Format>(work, at, n, grad);
}

/// The averaged gradient of one block: in scratch, or where it already lies.
using Average = const float* (*)(const Work&, std::uint64_t at, std::size_t n, float* scratch);

template <class Format>
const float* average(const Work& work, std::uint64_t at, std::size_t n, float* scratch) {
  average_into<Format>(work, at, n, scratch);
  return scratch;
}

inline const float* only_slot(const Work& work, std::uint64_t at, std::size_t, float*) {
  return static_cast<const float*>(work.slots[0]) + at;
}

inline Average choose_average(const Work& work) {
  const bool as_it_is = work.slot_count == 1 && work.scales == nullptr && work.factor == 1.0f &&
                        work.divisor == 1.0f && work.coef == 1.0f && work.base == nullptr;
  switch (work.dtype) {
    case Dtype::kBf16: return average<Bf16>;
    case Dtype::kF16: return average<F16>;
    default: return as_it_is ? only_slot : average<F32>;
  }
}

using Publish = void (*)(const Work&, std::uint64_t at, std::size_t n);

template <class Format>
void publish(const Work& work, std::uint64_t at, std::size_t n) {
  const float* __restrict master = work.master + at;
  auto* __restrict out = static_cast<typename Format::Stored*>(work.weights) + at;
  for (std::size_t i = 0; i < n; ++i) out[i] = Format::store(master[i]);
}

/// nullptr: the master is what is published.
inline Publish choose_publish(const Work& work) {
  switch (work.dtype) {
    case Dtype::kBf16: return publish<Bf16>;
    case Dtype::kF16: return publish<F16>;
    default: return nullptr;
  }
}

template <class Update>
void update_block(const Update& update, const Work& work, std::uint64_t at, std::size_t n,
                  const float* __restrict grad) {
  constexpr unsigned kUsed = Update::kStates;
  float* __restrict weights = work.master + at;
  float* __restrict first = kUsed & 1 ? work.states[0] + at : nullptr;
  float* __restrict second = kUsed & 2 ? work.states[1] + at : nullptr;
  float* __restrict third = kUsed & 4 ? work.states[2] + at : nullptr;
  for (std::size_t i = 0; i < n; ++i) {
    float weight = weights[i];
    float state[3];
    if constexpr ((kUsed & 1) != 0) state[0] = first[i];
    if constexpr ((kUsed & 2) != 0) state[1] = second[i];
    if constexpr ((kUsed & 4) != 0) state[2] = third[i];
    update(weight, grad[i], state);
    weights[i] = weight;
    if constexpr ((kUsed & 1) != 0) first[i] = state[0];
    if constexpr ((kUsed & 2) != 0) second[i] = state[1];
    if constexpr ((kUsed & 4) != 0) third[i] = state[2];
  }
}

/// Calls visit(at, n) for every block of [begin, end).
template <class Visit>
void for_blocks(std::uint64_t begin, std::uint64_t end, const Visit& visit) {
  for (std::uint64_t at = begin; at < end; at += kBlock) {
    visit(at, end - at < kBlock ? end - at : kBlock);
  }
}

struct ApplyBlocks {
  const Work& work;
  std::uint64_t begin, end;

  template <class Update>
  void operator()(const Update& given) const {
    const Update update = given;  // a copy: no store of the loop can change its scalars
    const Average average_block = choose_average(work);
    const Publish publish_block = choose_publish(work);
    alignas(64) float scratch[kBlock];
    for_blocks(begin, end, [&](std::uint64_t at, std::size_t n) {
      update_block(update, work, at, n, average_block(work, at, n, scratch));
      if (publish_block != nullptr) publish_block(work, at, n);
    });
  }
};

void apply(const Work& work, const Segment& segment, std::uint64_t begin, std::uint64_t end) {
  const double* hyper = work.hypers + std::uint64_t{segment.group} * work.hyper_count;
  with_update(work.rule, hyper, work.steps[segment.param], work.lr_factor,
              ApplyBlocks{work, begin, end});
}

/// Calls visit with the format of dtype.
template <class Visit>
auto with_format(Dtype dtype, const Visit& visit) {
  switch (dtype) {
    case Dtype::kBf16: return visit(Bf16{});
    case Dtype::kF16: return visit(F16{});
    default: return visit(F32{});
  }
}

void reduce(const Work& work, std::uint64_t begin, std::uint64_t end, float* out) {
  with_format(work.dtype, [&](auto format) {
    for_blocks(begin, end, [&](std::uint64_t at, std::size_t n) {
      average_into<decltype(format)>(work, at, n, out + at);
    });
  });
}

/// Lanes of a sum of squares: a fixed number, so that its value does not depend on the target.
constexpr std::size_t kLanes = 16;
static_assert(kBlock % kLanes == 0);

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

inline double sum_of(double* lanes) {
  for (std::size_t width = kLanes / 2; width > 0; width /= 2) {
    for (std::size_t k = 0; k < width; ++k) lanes[k] += lanes[k + width];
  }
  return lanes[0];
}

double norm_sq(const Work& work, std::uint64_t begin, std::uint64_t end) {
  const Average average_block = choose_average(work);
  alignas(64) float scratch[kBlock];
  double lanes[kLanes] = {};
  for_blocks(begin, end, [&](std::uint64_t at, std::size_t n) {
    add_squares<F32, false>(average_block(work, at, n, scratch), n, lanes, nullptr);
  });
  return sum_of(lanes);
}

double encode(const void* source, void* out, std::uint64_t n, Dtype dtype) {
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

const Kernels kernels = {apply, reduce, norm_sq, encode, stream};

}  // namespace zps::ZPS_TARGET
