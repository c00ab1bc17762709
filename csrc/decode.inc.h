// From the bytes of a piece to floats, a block at a time, straight into the caller's scratch.
// Any bytes are safe: every index is bounded where it is used, after it was read once.
#pragma once

#include "codec/bytes.h"
#include "codec/fp8.h"
#include "codec/randk.h"
#include "codec/sign.h"
#include "codec/topk.h"
#include "core/work.h"
#include "f16.inc.h"

namespace zps::ZPS_TARGET {

/// Elements decoded and averaged before the rule reads them: 8 cache lines of scratch. Small, so
/// that slots, weights and states are fetched side by side: with blocks of a page or more the
/// hardware prefetchers of one group of streams idle while the other runs, at up to 30 % of the
/// bandwidth. It divides every tile, so a block never crosses one.
constexpr std::size_t kBlock = 128;
constexpr unsigned kBlockShift = 7;

/// What becomes of a decoded value: it is stored or added, and may be scaled before.
template <bool Add, bool Scaled>
struct Put {
  static constexpr bool kAdd = Add;
  float scale;

  ZPS_HD void operator()(float& out, float value) const {
    if (Scaled) value *= scale;
    out = Add ? out + value : value;
  }

  /// The same for a vector.
  template <class Floats>
  ZPS_HD void wide(float* out, Floats value) const {
    Floats before;
    if (Scaled) value *= scale;
    if (Add) {
      memcpy(&before, out, sizeof before);
      value = before + value;
    }
    memcpy(out, &value, sizeof value);
  }
};

template <class Format, class Sink>
void decode_cast(const uint8_t* __restrict bytes, std::size_t n, const Sink& sink,
                 float* __restrict out) {
  const Sink put = sink;
  std::size_t i = 0;
  if constexpr (__is_same(Format, F16)) {
    alignas(64) float wide[kBlock];
    i = widen_f16(bytes, n < kBlock ? n : kBlock, wide);
    for (std::size_t k = 0; k < i; ++k) put(out[k], wide[k]);
  }
  for (; i < n; ++i) put(out[i], Format::load(load_as<uint16_t>(bytes + 2 * i)));
}

/// Codes of less than a byte become one a byte, in scratch.
template <class Group>
ZPS_HD const uint8_t* unpack(const uint8_t* __restrict packed, std::size_t n,
                             uint8_t* __restrict codes) {
  const std::size_t bytes = (n + Group::kCodes - 1) / Group::kCodes;
  for (std::size_t i = 0; i < bytes; ++i) {
    store_as<typename Group::Word>(codes + i * Group::kCodes, Group::unpack(packed[i]));
  }
  return codes;
}

struct Whole {};  // codes of a byte need no unpacking

template <class Group>
ZPS_HD const uint8_t* codes_of(const uint8_t* codes, uint64_t at, std::size_t n, uint8_t* scratch) {
  if constexpr (__is_same(Group, Whole)) {
    return codes + at;
  } else {
    const uint8_t* packed = codes + at / Group::kCodes;
    return n < kBlock ? unpack<Group>(packed, n, scratch) : unpack<Group>(packed, kBlock, scratch);
  }
}

template <class Code>
ZPS_HD float value_of(uint8_t code) {
  return static_cast<float>(Code::level(static_cast<int32_t>(code)));
}

template <>
ZPS_HD float value_of<E4m3>(uint8_t code) {
  return E4m3::load(code);
}

/// Block is the length of a run with one scale; of a whole block of scratch the compiler knows n too.
template <class Code, std::size_t Block, class Sink>
ZPS_HD void scale_codes(const uint8_t* __restrict codes, const uint8_t* scales, std::size_t n,
                        const Sink& sink, float* __restrict out) {
  const Sink put = sink;
  for (std::size_t first = 0; first < n; first += Block, scales += sizeof(float)) {
    const float scale = load_as<float>(scales);
    const std::size_t count = n - first < Block ? n - first : Block;
    for (std::size_t i = first; i < first + count; ++i) {
      put(out[i], value_of<Code>(codes[i]) * scale);
    }
  }
}

template <class Code, std::size_t Block, class Sink>
void scale_block(const uint8_t* codes, const uint8_t* scales, std::size_t n, const Sink& sink,
                 float* out) {
  n < kBlock ? scale_codes<Code, Block>(codes, scales, n, sink, out)
             : scale_codes<Code, Block>(codes, scales, kBlock, sink, out);
}

#if defined(__AVX2__)

// A vector of codes straight from the bytes that hold them, for targets that can shift every lane by
// its own count: the compiler makes scalar code of such a loop, and unpacking into scratch first
// takes twice as long.

#if defined(__AVX512F__)
constexpr std::size_t kWide = 16;
using Ints = int32_t __attribute__((vector_size(64)));
using Floats = float __attribute__((vector_size(64)));
constexpr Ints kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
constexpr std::size_t kWide = 8;
using Ints = int32_t __attribute__((vector_size(32)));
using Floats = float __attribute__((vector_size(32)));
constexpr Ints kLane = {0, 1, 2, 3, 4, 5, 6, 7};
#endif

// Lane i of what spread returns holds the i-th code from here in its lowest bits.

ZPS_HD Ints spread(Nibbles, const uint8_t* packed) {
  const Ints low = Ints{} + load_as<int32_t>(packed);
  if constexpr (kWide == 8) return low >> 4 * kLane;
  const Ints high = Ints{} + load_as<int32_t>(packed + kWide / 2 - 4);
  return (kLane < 8 ? low : high) >> (4 * (kLane & 7));
}

ZPS_HD Ints spread(Pairs, const uint8_t* packed) {
  const int32_t word = kWide == 16 ? load_as<int32_t>(packed) : load_as<uint16_t>(packed);
  return (Ints{} + word) >> 2 * kLane;
}

ZPS_HD Ints spread(Bits, const uint8_t* packed) {
  const int32_t word = kWide == 16 ? load_as<uint16_t>(packed) : *packed;
  return (Ints{} + word) >> kLane;
}

/// What every code of a run decodes to: the same product as anywhere else.
template <class Code, class Group>
struct Values {
  static constexpr int32_t kMask = (1 << 8 / Group::kCodes) - 1;

  ZPS_HD explicit Values(float scale) : scale_(scale), table_(of(kLane, scale)) {}

  ZPS_HD Floats operator()(Ints codes) const {
#if defined(__AVX512F__) && !defined(__clang__)
    return __builtin_shuffle(table_, codes);  // looks at 4 bits; the table repeats itself
#else
    return of(codes, scale_);
#endif
  }

 private:
  static ZPS_HD Floats of(Ints codes, float scale) {
    return __builtin_convertvector(Code::level(codes & kMask), Floats) * scale;
  }

  float scale_;
  Floats table_;
};

/// A whole block of scratch.
template <class Code, class Group, class Sink>
void decode_wide(const Encoding& e, const uint8_t* bytes, uint64_t at, const Sink& sink,
                 float* out) {
  const Sink put = sink;
  const uint8_t* codes = bytes + e.codes + at / Group::kCodes;
  const unsigned shift = e.shift < kBlockShift ? e.shift : kBlockShift;
  const std::size_t block = std::size_t{1} << shift;
  for (std::size_t first = 0; first < kBlock; first += block) {
    const Values<Code, Group> values(load_as<float>(bytes + 4 * ((at + first) >> e.shift)));
    for (std::size_t i = first; i < first + block; i += kWide) {
      put.wide(out + i, values(spread(Group{}, codes + i / Group::kCodes)));
    }
  }
}

#endif

template <class Code, class Group, class Sink>
void decode_codes(const Encoding& e, const uint8_t* bytes, uint64_t at, std::size_t n,
                  const Sink& sink, float* out) {
#if defined(__AVX2__)
  if constexpr (!__is_same(Group, Whole)) {
    if (n >= kBlock) return decode_wide<Code, Group>(e, bytes, at, sink, out);
  }
#endif
  alignas(64) uint8_t scratch[kBlock];
  const uint8_t* codes = codes_of<Group>(bytes + e.codes, at, n, scratch);
  const uint8_t* scales = bytes + 4 * (at >> e.shift);
  switch (e.shift) {
    case 4: return scale_block<Code, 16>(codes, scales, n, sink, out);
    case 5: return scale_block<Code, 32>(codes, scales, n, sink, out);
    case 6: return scale_block<Code, 64>(codes, scales, n, sink, out);
    default: return scale_block<Code, kBlock>(codes, scales, n, sink, out);
  }
}

/// The first of entries [from, to) whose index is not below `index`.
inline uint32_t first_entry(const uint8_t* indices, uint32_t from, uint32_t to, uint32_t index) {
  while (from < to) {
    const uint32_t middle = from + (to - from) / 2;
    if (load_as<uint16_t>(indices + 2 * uint64_t{middle}) < index) {
      from = middle + 1;
    } else {
      to = middle;
    }
  }
  return from;
}

/// Elements that a sparse piece does not name are 0, or left as they are.
template <class Sink>
void clear_unless_added(std::size_t n, float* __restrict out) {
  if (Sink::kAdd) return;
  for (std::size_t i = 0; i < n; ++i) out[i] = 0.0f;
}

template <class Sink>
void decode_topk(const Encoding& e, const uint8_t* bytes, uint64_t at, std::size_t n,
                 const Sink& put, float* out) {
  clear_unless_added<Sink>(n, out);
  const uint8_t* offsets = bytes + 4 * (at >> kTileShift);
  const uint8_t* indices = bytes + e.codes;
  const uint8_t* values = bytes + e.values;
  const bool half = (e.flags & kHalfValues) != 0;
  const auto most = static_cast<uint32_t>(e.k);
  const uint32_t from = once(load_as<uint32_t>(offsets));
  uint32_t to = once(load_as<uint32_t>(offsets + 4));
  to = to < most ? to : most;
  const auto first = static_cast<uint32_t>(at & ((1u << kTileShift) - 1));
  for (uint64_t entry = first_entry(indices, from, to, first); entry < to; ++entry) {
    const uint32_t i = once(load_as<uint16_t>(indices + 2 * entry)) - first;
    if (i >= n) break;
    put(out[i], half ? F16::load(load_as<uint16_t>(values + 2 * entry))
                     : load_as<float>(values + 4 * entry));
  }
}

template <class Sink>
void decode_randk(const Encoding& e, const uint8_t* bytes, uint64_t at, std::size_t n,
                  const Sink& put, float* out) {
  clear_unless_added<Sink>(n, out);
  const Draws draws = Draws::of(load_as<uint64_t>(bytes));
  const Strata strata = {e.n, e.k};
  for (Walk walk(strata, strata.of(at)); walk.stratum() < e.k && walk.begin() < at + n;
       walk.next()) {
    const uint64_t i = walk.chosen(draws) - at;  // the first stratum may have chosen before `at`
    if (i < n) put(out[i], load_as<float>(bytes + e.codes + 4 * walk.stratum()));
  }
}

/// Elements [at, at + n) of a piece; `at` is a multiple of kBlock and n at most kBlock.
template <class Sink>
void decode_block(const Encoding& e, const uint8_t* bytes, uint64_t at, std::size_t n,
                  const Sink& put, float* out) {
  switch (e.kind) {
    case Kind::kNone: return;  // not coded: the caller reads it in its own dtype
    case Kind::kFp16: return decode_cast<F16>(bytes + 2 * at, n, put, out);
    case Kind::kBf16: return decode_cast<Bf16>(bytes + 2 * at, n, put, out);
    case Kind::kFp8: return decode_codes<E4m3, Whole>(e, bytes, at, n, put, out);
    case Kind::kInt8: return decode_codes<Int8Code, Whole>(e, bytes, at, n, put, out);
    case Kind::kInt4: return decode_codes<Int4Code, Nibbles>(e, bytes, at, n, put, out);
    case Kind::kOnebit: return decode_codes<Onebit, Bits>(e, bytes, at, n, put, out);
    case Kind::kTernary: return decode_codes<TernaryCode, Pairs>(e, bytes, at, n, put, out);
    case Kind::kTopk: return decode_topk(e, bytes, at, n, put, out);
    case Kind::kRandk: return decode_randk(e, bytes, at, n, put, out);
  }
}

}  // namespace zps::ZPS_TARGET
