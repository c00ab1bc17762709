// Randomness from a counter: the same for any thread, order and instruction set.
#pragma once

#include "optim/target.h"

namespace zps::ZPS_TARGET {

/// What a seed becomes: one number is added to the counter, one mixed in half-way, so that two
/// seeds are not two places of one sequence.
struct Draws {
  uint32_t add, mix;

  /// Source: Steele et al., Fast Splittable Pseudorandom Number Generators (2014): SplitMix64.
  static ZPS_HD Draws of(uint64_t seed) {
    uint64_t z = seed + 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return {static_cast<uint32_t>(z), static_cast<uint32_t>(z >> 32)};
  }

  /// 32 random bits. Source of the mixing: Austin Appleby, MurmurHash3, fmix32 (public domain).
  ZPS_HD uint32_t bits(uint32_t counter) const {
    uint32_t x = counter * 0x9e3779b9u + add;
    x = (x ^ x >> 16) * 0x85ebca6bu;
    x ^= mix;
    x = (x ^ x >> 13) * 0xc2b2ae35u;
    return x ^ x >> 16;
  }
};

/// Uniform in [0, 1), a multiple of 2**-24.
ZPS_HD float unit(uint32_t bits) {
  return static_cast<float>(static_cast<int32_t>(bits >> 8)) * 0x1p-24f;
}

}  // namespace zps::ZPS_TARGET
