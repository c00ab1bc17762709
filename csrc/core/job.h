// One bucket's work: what is fixed for its life, and what each round sets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/work.h"
#include "core/words.h"

namespace zps {

class Job {
 public:
  struct Round {
    std::vector<std::uintptr_t> states;  // 0: switched off by the hyperparameters
    std::vector<std::uintptr_t> slots;
    std::vector<float> scales;  // one per slot
    float divisor;
    const double* hypers;
    const std::int64_t* steps;
    float coef;
    double lr_factor;
    float dc_lambda;
    std::uintptr_t base;
  };

  /// codecs and encoded are one a place; nullptr: nothing is coded, and slots lie as weights do.
  Job(Rule rule, Dtype dtype, std::uint32_t hyper_count, const Place* places,
      const Codec* codecs, const std::uint64_t* encoded, std::size_t place_count,
      std::uintptr_t weights, std::uintptr_t master, std::uintptr_t seq);
  Job(const Job&) = delete;  // work_ points into the vectors
  Job& operator=(const Job&) = delete;

  /// Throws std::invalid_argument if the hyperparameters use a state that has no memory.
  void set_round(Round round);

  /// Changes the weights of the round's slots, one each, and what their sum is divided by.
  void set_weights(std::vector<float> scales, float divisor);

  const Work& work() const { return work_; }
  const std::vector<Segment>& segments() const { return segments_; }
  Word64* seq() const { return seq_; }

 private:
  void weigh();
  void check_states() const;

  Work work_{};
  std::vector<Segment> segments_;
  Word64* seq_;
  Round round_{};
};

}  // namespace zps
