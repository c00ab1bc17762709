// float16 by the instructions that convert it, where the target has them: in plain code it takes
// twenty operations, and the compiler vectorises the conversion of no type it knows. The results are
// those of codec/half.h, but for the payload of a NaN.
#pragma once

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "codec/cast.h"

namespace zps::ZPS_TARGET {

#if defined(__F16C__)

/// Narrows whole vectors as CastF16 does; decoded is what they widen to. Returns how many elements.
inline std::size_t narrow_f16(const float* v, std::size_t n, uint8_t* out, float* decoded) {
  const __m256 most = _mm256_set1_ps(65504.0f), least = _mm256_set1_ps(-65504.0f);
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    // The second operand is what a NaN leaves.
    const __m256 held = _mm256_max_ps(least, _mm256_min_ps(most, _mm256_loadu_ps(v + i)));
    const __m128i halves = _mm256_cvtps_ph(held, _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * i), halves);
    _mm256_storeu_ps(decoded + i, _mm256_cvtph_ps(halves));
  }
  return i;
}

/// Widens whole vectors; returns how many elements.
inline std::size_t widen_f16(const uint8_t* halves, std::size_t n, float* wide) {
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const auto* from = reinterpret_cast<const __m128i*>(halves + 2 * i);
    _mm256_storeu_ps(wide + i, _mm256_cvtph_ps(_mm_loadu_si128(from)));
  }
  return i;
}

#else

inline std::size_t narrow_f16(const float*, std::size_t, uint8_t*, float*) { return 0; }
inline std::size_t widen_f16(const uint8_t*, std::size_t, float*) { return 0; }

#endif

}  // namespace zps::ZPS_TARGET
