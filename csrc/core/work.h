// The plain structs that kernels see. No std types: a template instantiated in one target's object
// file could be the copy that another target's code is linked to.
#pragma once

#include <cstdint>

namespace zps {

enum class Dtype : std::uint32_t { kF32, kBf16, kF16 };

enum class Rule : std::uint32_t {
  kSum,
  kMean,
  kAssign,
  kAdd,
  kSgd,
  kAdam,
  kAdagrad,
  kRmsprop,
  kLion,
};

constexpr int kMaxStates = 4;

/// A piece of one parameter inside a bucket. Offsets count elements from the bucket's first.
struct Segment {
  std::uint64_t begin;
  std::uint64_t count;
  std::uint32_t group;  // row of Work::hypers
  std::uint32_t param;  // index into Work::steps
};
static_assert(sizeof(Segment) == 24, "zps.native.SEGMENT is the same layout");

/// What one application of a rule to one bucket reads and writes.
/// Every pointer is for the bucket's first element.
struct Work {
  Rule rule;
  Dtype dtype;    // of the slots, the published weights and the base
  void* weights;  // published
  float* master;  // == weights when dtype is kF32
  float* states[kMaxStates];

  const void* const* slots;
  const float* scales;  // nullptr: every scale is 1
  std::uint32_t slot_count;
  float factor;   // multiplies the sum
  float divisor;  // then divides it: 1 where the factor does so exactly
  float coef;     // then multiplies the average
  float dc_lambda;
  const void* base;  // the weights the gradient was computed on; nullptr: no delay compensation

  const double* hypers;  // [groups, hyper_count]
  std::uint32_t hyper_count;
  const std::int64_t* steps;  // per parameter, 1-based; 0: the parameter takes no part
  double lr_factor;
};

}  // namespace zps
