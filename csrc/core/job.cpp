#include "core/job.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "codec/encoding.h"
#include "optim/facts.h"

namespace zps {
namespace {

/// Whether multiplying by 1 / divisor gives the same bits as dividing: for powers of two.
bool divides_exactly(float divisor) {
  int exponent = 0;
  return std::frexp(divisor, &exponent) == 0.5f && std::isfinite(1.0f / divisor);
}

}  // namespace

Job::Job(Rule rule, Dtype dtype, std::uint32_t hyper_count, const Place* places,
         const Codec* codecs, const std::uint64_t* encoded, std::size_t place_count,
         std::uintptr_t weights, std::uintptr_t master, std::uintptr_t seq)
    : seq_(reinterpret_cast<Word64*>(seq)) {
  const std::uint64_t itemsize = dtype == Dtype::kF32 ? 4 : 2;
  for (std::size_t i = 0; i < place_count; ++i) {
    const Place& place = places[i];
    const Codec codec = codecs != nullptr ? codecs[i] : Codec{};
    const std::uint64_t byte = encoded != nullptr ? encoded[i] : place.begin * itemsize;
    segments_.push_back({place, byte, encoding_of(codec, place.count, itemsize)});
  }
  work_.rule = rule;
  work_.dtype = dtype;
  work_.hyper_count = hyper_count;
  work_.weights = reinterpret_cast<void*>(weights);
  work_.master = reinterpret_cast<float*>(master);
}

void Job::set_round(Round round) {
  round_ = std::move(round);
  if (work_.rule == Rule::kAssign) round_.slots.resize(1);
  work_.slots = reinterpret_cast<const void* const*>(round_.slots.data());
  work_.slot_count = static_cast<std::uint32_t>(round_.slots.size());
  weigh();
  work_.coef = round_.coef;
  work_.dc_lambda = round_.dc_lambda;
  work_.base = reinterpret_cast<const void*>(round_.base);
  work_.hypers = round_.hypers;
  work_.steps = round_.steps;
  work_.lr_factor = round_.lr_factor;
  std::transform(round_.states.begin(), round_.states.end(), work_.states,
                 [](std::uintptr_t address) { return reinterpret_cast<float*>(address); });
  check_states();
}

void Job::set_weights(std::vector<float> scales, float divisor) {
  round_.scales = std::move(scales);
  round_.divisor = divisor;
  weigh();
}

void Job::weigh() {
  // assign takes the first contribution as it is; sum and add do not divide.
  const bool assign = work_.rule == Rule::kAssign;
  const bool divides = !assign && work_.rule != Rule::kSum && work_.rule != Rule::kAdd;
  const bool scaled = !assign && std::any_of(round_.scales.begin(), round_.scales.end(),
                                             [](float scale) { return scale != 1.0f; });
  work_.scales = scaled ? round_.scales.data() : nullptr;
  const float divisor = divides ? round_.divisor : 1.0f;
  const bool exact = divides_exactly(divisor);
  work_.factor = exact ? 1.0f / divisor : 1.0f;
  work_.divisor = exact ? 1.0f : divisor;
}

void Job::check_states() const {
  std::uint32_t checked = UINT32_MAX;  // neighbours mostly share a group
  for (const Segment& segment : segments_) {
    if (segment.group == checked) continue;
    checked = segment.group;
    const double* hyper = work_.hypers + std::uint64_t{checked} * work_.hyper_count;
    const unsigned used = states_used(work_.rule, hyper);
    for (int state = 0; state < kMaxStates; ++state) {
      if ((used >> state & 1) != 0 && work_.states[state] == nullptr) {
        throw std::invalid_argument("group " + std::to_string(checked) + " uses state " +
                                    std::to_string(state) + ", which has no memory");
      }
    }
  }
}

}  // namespace zps
