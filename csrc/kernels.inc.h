// The loops, compiled once per target: kernels_<target>.cpp defines ZPS_TARGET and includes this.
// They are plain and vectorised by the compiler; contraction is off, so every target rounds alike
// and results are equal bit for bit.

#include "encode.inc.h"
#include "gather.inc.h"
#include "kernels.h"
#include "optim/rules.h"
#include "stream.inc.h"

namespace zps::ZPS_TARGET {

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
  const Segment& segment;
  std::uint64_t begin, end;

  template <class Update>
  void operator()(const Update& given) const {
    const Update update = given;  // a copy: no store of the loop can change its scalars
    const Average average_block = choose_average(work, segment);
    const Publish publish_block = choose_publish(work);
    alignas(64) float scratch[kBlock];
    for_blocks(begin, end, [&](std::uint64_t at, std::size_t n) {
      update_block(update, work, at, n, average_block(work, segment, at, n, scratch));
      if (publish_block != nullptr) publish_block(work, at, n);
    });
  }
};

void apply(const Work& work, const Segment& segment, std::uint64_t begin, std::uint64_t end) {
  const double* hyper = work.hypers + std::uint64_t{segment.group} * work.hyper_count;
  with_update(work.rule, hyper, work.steps[segment.param], work.lr_factor,
              ApplyBlocks{work, segment, begin, end});
}

void reduce(const Work& work, const Segment& segment, std::uint64_t begin, std::uint64_t end,
            float* out) {
  with_format(work.dtype, [&](auto format) {
    for_blocks(begin, end, [&](std::uint64_t at, std::size_t n) {
      average_into<decltype(format)>(work, segment, at, n, out + at);
    });
  });
}

double norm_sq(const Work& work, const Segment& segment, std::uint64_t begin, std::uint64_t end) {
  const Average average_block = choose_average(work, segment);
  alignas(64) float scratch[kBlock];
  double lanes[kLanes] = {};
  for_blocks(begin, end, [&](std::uint64_t at, std::size_t n) {
    add_squares<F32, false>(average_block(work, segment, at, n, scratch), n, lanes, nullptr);
  });
  return sum_of(lanes);
}

const Kernels kernels = {apply, reduce, norm_sq, copy, encode, decode, stream, move};

}  // namespace zps::ZPS_TARGET
