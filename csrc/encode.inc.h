// From a gradient to the bytes of a piece, in one pass over memory: a unit is loaded into scratch
// that stays in L1, and everything else (statistics, codes, what was lost) happens there.
#pragma once

#include "codec/bytes.h"
#include "codec/fp8.h"
#include "codec/randk.h"
#include "codec/sign.h"
#include "decode.inc.h"
#include "f16.inc.h"
#include "flow.inc.h"
#include "select.inc.h"

namespace zps::ZPS_TARGET {

/// Elements in scratch at a time, at least: less would leave loops short.
constexpr std::size_t kUnit = 256;

inline uint32_t absmax_bits(const float* v, std::size_t n) {
  int32_t most = 0;  // signed, because SSE2 has no unsigned maximum; the sign bit is masked off
  for (std::size_t i = 0; i < n; ++i) {
    const auto size = static_cast<int32_t>(size_of_value(v[i]));
    most = size > most ? size : most;
  }
  return static_cast<uint32_t>(most);
}

/// The sum of magnitude(v[i]), in lanes: the same on every target.
template <class Real, class Magnitude>
double sum_in(const float* v, std::size_t n, const Magnitude& magnitude) {
  Real lanes[kLanes] = {};
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (std::size_t k = 0; k < kLanes; ++k) lanes[k] += magnitude(v[i + k]);
  }
  for (std::size_t k = 0; i < n; ++i, ++k) lanes[k] += magnitude(v[i]);
  return sum_of(lanes);
}

/// Floats are twice as fast, and overflow at the end of their range only.
template <class Magnitude>
double sum_magnitudes(const float* v, std::size_t n, const Magnitude& magnitude) {
  const double sum = sum_in<float>(v, n, magnitude);
  return sum <= 3.0e38 ? sum : sum_in<double>(v, n, magnitude);
}

inline double sum_all(const float* v, std::size_t n) {
  return sum_magnitudes(v, n, [](float one) { return fabsf(one); });
}

inline double sum_above(const float* v, std::size_t n, float threshold) {
  return sum_magnitudes(v, n, [=](float one) {
    const float size = fabsf(one);
    return size > threshold ? size : 0.0f;
  });
}

inline std::size_t count_above(const float* v, std::size_t n, float threshold) {
  int32_t count = 0;
  for (std::size_t i = 0; i < n; ++i) count += fabsf(v[i]) > threshold ? 1 : 0;
  return static_cast<std::size_t>(count);
}

inline float mean_of(double sum, std::size_t count) {
  return count == 0 ? 0.0f : static_cast<float>(sum / static_cast<double>(count));
}

template <class Quantiser>
Scale measure(const float* v, std::size_t n) {
  return scale_to(Quantiser::kMost, absmax_bits(v, n));
}

template <>
inline Scale measure<Onebit>(const float* v, std::size_t n) {
  return {mean_of(sum_all(v, n), n), 0.0f, 0.0f};
}

template <>
inline Scale measure<Ternary>(const float* v, std::size_t n) {
  const float threshold = Ternary::kThreshold * mean_of(sum_all(v, n), n);
  return {mean_of(sum_above(v, n, threshold), count_above(v, n, threshold)), 0.0f, threshold};
}

template <class Quantiser, bool Random>
ZPS_HD void quantise(const float* __restrict v, std::size_t n, const Scale& shared,
                     const Draws& draws, uint32_t counter, uint8_t* __restrict codes,
                     float* __restrict decoded) {
  const Scale scale = shared;
  for (std::size_t i = 0; i < n; ++i) {
    const uint32_t random = Random ? draws.bits(counter + static_cast<uint32_t>(i)) : 0;
    const Quantised q = Quantiser::quantise(v[i], scale, random);
    codes[i] = q.code;
    decoded[i] = q.value;
  }
}

template <class Group>
void pack(uint8_t* __restrict codes, std::size_t n, uint8_t* __restrict out) {
  const std::size_t bytes = (n + Group::kCodes - 1) / Group::kCodes;
  for (std::size_t i = n; i < bytes * Group::kCodes; ++i) codes[i] = 0;  // bits nobody reads
  for (std::size_t i = 0; i < bytes; ++i) {
    out[i] = Group::pack(load_as<typename Group::Word>(codes + i * Group::kCodes));
  }
}

template <class Quantiser, bool Random, class Group>
double encode_scaled(const EncodeCall& call) {
  const Encoding& e = call.encoding;
  const std::size_t block = std::size_t{1} << e.shift;
  const Draws draws = Draws::of(call.seed);
  alignas(64) uint8_t scratch[kTile];
  return for_units(call, block < kUnit ? kUnit : block,
                   [&](const Flow& flow, uint64_t at, std::size_t n, float* v) {
    alignas(64) float decoded[kTile];
    uint8_t* out = call.out + e.codes;
    uint8_t* codes = scratch;
    if constexpr (__is_same(Group, Whole)) codes = out + at;
    for (std::size_t first = 0; first < n; first += block) {
      const std::size_t count = n - first < block ? n - first : block;
      const Scale scale = measure<Quantiser>(v + first, count);
      store_as<float>(call.out + 4 * ((at + first) >> e.shift), scale.step);
      quantise<Quantiser, Random>(v + first, count, scale, draws,
                                  static_cast<uint32_t>(at + first), codes + first,
                                  decoded + first);
    }
    if constexpr (!__is_same(Group, Whole)) pack<Group>(codes, n, out + at / Group::kCodes);
    flow.settle(call, at, n, v, decoded);
  });
}

template <class Code, class Group>
double encode_uniform(const EncodeCall& call) {
  return (call.encoding.flags & kStochastic) != 0
             ? encode_scaled<Stochastic<Code>, true, Group>(call)
             : encode_scaled<Nearest<Code>, false, Group>(call);
}

inline double encode_fp8(const EncodeCall& call) {
  return (call.encoding.flags & kStochastic) != 0 ? encode_scaled<Fp8<true>, true, Whole>(call)
                                                  : encode_scaled<Fp8<false>, false, Whole>(call);
}

inline double encode_ternary(const EncodeCall& call) {
  return (call.encoding.flags & kStochastic) != 0
             ? encode_scaled<Stochastic<TernaryCode>, true, Pairs>(call)
             : encode_scaled<Ternary, false, Pairs>(call);
}

template <class Format>
void cast_unit(const float* __restrict v, std::size_t n, uint8_t* __restrict out,
               float* __restrict decoded) {
  std::size_t i = 0;
  if constexpr (__is_same(Format, CastF16)) i = narrow_f16(v, n, out, decoded);
  for (; i < n; ++i) {
    const uint16_t half = Format::store(v[i]);
    store_as<uint16_t>(out + 2 * i, half);
    decoded[i] = Format::load(half);
  }
}

template <class Format>
double encode_cast(const EncodeCall& call) {
  return for_units(call, kUnit, [&](const Flow& flow, uint64_t at, std::size_t n, float* v) {
    alignas(64) float decoded[kUnit];
    cast_unit<Format>(v, n, call.out + 2 * at, decoded);
    flow.settle(call, at, n, v, decoded);
  });
}

inline double encode_randk(const EncodeCall& call) {
  const Encoding& e = call.encoding;
  const bool unbiased = (e.flags & kFeedback) == 0;
  const Draws draws = Draws::of(call.seed);
  store_as<uint64_t>(call.out, call.seed);
  if (e.n == 0) return 0.0;
  Walk walk({e.n, e.k}, 0);
  return for_units(call, kUnit, [&](const Flow& flow, uint64_t at, std::size_t n, float* v) {
    flow.keep(call, at, n, v);
    for (; walk.stratum() < e.k && walk.chosen(draws) < at + n; walk.next()) {
      const uint64_t index = walk.chosen(draws);
      const float here = v[index - at];
      const float value = unbiased ? here * static_cast<float>(walk.length()) : here;
      store_as<float>(call.out + e.codes + 4 * walk.stratum(), value);
      flow.patch(call, index, here, value);
    }
  });
}

inline double encode(const EncodeCall& call) {
  switch (call.encoding.kind) {
    case Kind::kNone: break;  // copied: see copy
    case Kind::kFp16: return encode_cast<CastF16>(call);
    case Kind::kBf16: return encode_cast<CastBf16>(call);
    case Kind::kFp8: return encode_fp8(call);
    case Kind::kInt8: return encode_uniform<Int8Code, Whole>(call);
    case Kind::kInt4: return encode_uniform<Int4Code, Nibbles>(call);
    case Kind::kOnebit: return encode_scaled<Onebit, false, Bits>(call);
    case Kind::kTernary: return encode_ternary(call);
    case Kind::kTopk: return encode_topk(call);
    case Kind::kRandk: return encode_randk(call);
  }
  return 0.0;
}

template <class Format, bool Add>
void decode_into(const DecodeCall& call) {
  using Stored = typename Format::Stored;
  const Encoding& e = call.encoding;
  alignas(64) float decoded[kBlock];
  for (uint64_t at = 0; at < e.n; at += kBlock) {
    const std::size_t n = e.n - at < kBlock ? e.n - at : kBlock;
    Stored* __restrict out = static_cast<Stored*>(call.out) + at;
    if (e.kind == Kind::kNone) {
      const uint8_t* from = call.bytes + at * sizeof(Stored);
      for (std::size_t i = 0; i < n; ++i) {
        decoded[i] = Format::load(load_as<Stored>(from + i * sizeof(Stored)));
      }
    } else {
      decode_block(e, call.bytes, at, n, Put<false, false>{}, decoded);
    }
    for (std::size_t i = 0; i < n; ++i) {
      out[i] = Format::store(Add ? Format::load(out[i]) + decoded[i] : decoded[i]);
    }
  }
}

inline void decode(const DecodeCall& call) {
  with_format(call.dtype, [&](auto format) {
    call.add ? decode_into<decltype(format), true>(call)
             : decode_into<decltype(format), false>(call);
  });
}

}  // namespace zps::ZPS_TARGET
