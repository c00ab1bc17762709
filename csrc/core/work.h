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

enum class Kind : std::uint32_t {
  kNone,
  kFp16,
  kBf16,
  kFp8,
  kInt8,
  kInt4,
  kOnebit,
  kTernary,
  kTopk,
  kRandk,
};

constexpr std::uint32_t kFeedback = 1;     // what is lost is kept and added next time
constexpr std::uint32_t kStochastic = 2;   // rounding
constexpr std::uint32_t kExact = 4;        // top-k without a sampled threshold falling short
constexpr std::uint32_t kHalfValues = 8;   // top-k values as float16

/// A codec and its options.
struct Codec {
  Kind kind;
  std::uint32_t block;  // elements that share a scale: a power of two from 16 to 4096
  std::uint32_t flags;
  std::uint32_t reserved;
  double ratio;  // of the elements that topk and randk send
};
static_assert(sizeof(Codec) == 24, "zps.native.CODEC is the same layout");

/// How one piece is encoded: all that follows from its codec and its length. See codec/encoding.h.
struct Encoding {
  Kind kind;
  std::uint32_t flags;
  std::uint32_t shift;  // log2 of the block
  std::uint64_t n;      // elements
  std::uint64_t k;      // entries that topk and randk have room for
  std::uint64_t codes;  // bytes before the codes (topk: the indices; randk: the values)
  std::uint64_t values;  // bytes before the values of topk
  std::uint64_t nbytes;
};

/// A piece of one parameter inside a bucket, as zps.native.SEGMENT lays it out. Offsets count
/// elements from the bucket's first.
struct Place {
  std::uint64_t begin;
  std::uint64_t count;
  std::uint32_t group;  // row of Work::hypers
  std::uint32_t param;  // index into Work::steps
};
static_assert(sizeof(Place) == 24, "zps.native.SEGMENT is the same layout");

/// A piece, and where and how every slot holds it.
struct Segment : Place {
  std::uint64_t encoded;  // bytes from the slot's first
  Encoding encoding;
};

/// What one application of a rule to one bucket reads and writes.
/// Every pointer is for the bucket's first element.
struct Work {
  Rule rule;
  Dtype dtype;    // of uncoded slots, the published weights and the base
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
