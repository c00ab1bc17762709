// Included first by every header of arithmetic. The includer defines ZPS_TARGET: everything here is
// compiled once per target, in the target's namespace, so that the linker can never take one
// target's copy for another.
#pragma once

#ifndef ZPS_TARGET
#error "define ZPS_TARGET (base, avx2, avx512, cuda) before including the arithmetic"
#endif

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define ZPS_HD __host__ __device__ __forceinline__
#else
#define ZPS_HD inline __attribute__((always_inline))
#endif

namespace zps::ZPS_TARGET {

ZPS_HD uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

ZPS_HD float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/// torch.lerp: from whichever end is nearer, so that weight 1 gives exactly `to`.
ZPS_HD float lerp(float from, float to, float weight) {
  return weight < 0.5f ? from + weight * (to - from) : to - (to - from) * (1.0f - weight);
}

}  // namespace zps::ZPS_TARGET
