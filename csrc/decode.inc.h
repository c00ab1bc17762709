// From the bytes of a piece to floats, a block at a time, straight into the caller's scratch.
// Any bytes are safe: every index is bounded where it is used, after it was read once.
#pragma once

#include "codec/bytes.h"
#include "codec/fp8.h"
#include "codec/randk.h"
#include "codec/sign.h"
#include "codec/topk.h"
#include "core/work.h"

namespace zps::ZPS_TARGET {

/// Elements decoded and averaged before the rule reads them: 8 cache lines of scratch. Small, so
/// that slots, weights and states are fetched side by side: with blocks of a page or more the
/// hardware prefetchers of one group of streams idle while the other runs, at up to 30 % of the
/// bandwidth. It divides every tile, so a block never crosses one.
constexpr std::size_t kBlock = 128;
constexpr unsigned kBlockShift = 7;

template <class Format>
ZPS_HD void decode_cast(const uint8_t* bytes, std::size_t n, float* __restrict out) {
  for (std::size_t i = 0; i < n; ++i) out[i] = Format::load(load_as<uint16_t>(bytes + 2 * i));
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
    return unpack<Group>(codes + at / Group::kCodes, n, scratch);
  }
}

template <class Code>
ZPS_HD float value_of(uint8_t code) {
  return static_cast<float>(Code::level(code));
}

template <>
ZPS_HD float value_of<E4m3>(uint8_t code) {
  return E4m3::load(code);
}

template <class Code, class Group>
ZPS_HD void decode_scaled(const Encoding& e, const uint8_t* bytes, uint64_t at, std::size_t n,
                          float* __restrict out) {
  alignas(64) uint8_t scratch[kBlock];
  const uint8_t* __restrict codes = codes_of<Group>(bytes + e.codes, at, n, scratch);
  if (e.shift >= kBlockShift) {
    const float scale = load_as<float>(bytes + 4 * (at >> e.shift));
    for (std::size_t i = 0; i < n; ++i) out[i] = value_of<Code>(codes[i]) * scale;
    return;
  }
  const std::size_t block = std::size_t{1} << e.shift;
  for (std::size_t first = 0; first < n; first += block) {
    const float scale = load_as<float>(bytes + 4 * ((at + first) >> e.shift));
    const std::size_t end = n - first < block ? n : first + block;
    for (std::size_t i = first; i < end; ++i) out[i] = value_of<Code>(codes[i]) * scale;
  }
}

/// A whole block has its own copy of the loops, whose length the compiler knows.
template <class Code, class Group>
void decode_codes(const Encoding& e, const uint8_t* bytes, uint64_t at, std::size_t n, float* out) {
  n < kBlock ? decode_scaled<Code, Group>(e, bytes, at, n, out)
             : decode_scaled<Code, Group>(e, bytes, at, kBlock, out);
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

inline void decode_topk(const Encoding& e, const uint8_t* bytes, uint64_t at, std::size_t n,
                        float* __restrict out) {
  for (std::size_t i = 0; i < n; ++i) out[i] = 0.0f;
  const uint8_t* offsets = bytes + 4 * (at >> kTileShift);
  const uint8_t* indices = bytes + e.codes;
  const uint8_t* values = bytes + e.values;
  const auto most = static_cast<uint32_t>(e.k);
  const uint32_t from = once(load_as<uint32_t>(offsets));
  uint32_t to = once(load_as<uint32_t>(offsets + 4));
  to = to < most ? to : most;
  const auto first = static_cast<uint32_t>(at & ((1u << kTileShift) - 1));
  for (uint32_t entry = first_entry(indices, from, to, first); entry < to; ++entry) {
    const uint32_t i = once(load_as<uint16_t>(indices + 2 * uint64_t{entry})) - first;
    if (i >= n) break;
    out[i] = (e.flags & kHalfValues) != 0 ? F16::load(load_as<uint16_t>(values + 2 * uint64_t{entry}))
                                          : load_as<float>(values + 4 * uint64_t{entry});
  }
}

inline void decode_randk(const Encoding& e, const uint8_t* bytes, uint64_t at, std::size_t n,
                         float* __restrict out) {
  for (std::size_t i = 0; i < n; ++i) out[i] = 0.0f;
  const Draws draws = Draws::of(load_as<uint64_t>(bytes));
  const Strata strata = {e.n, e.k};
  for (Walk walk(strata, strata.of(at)); walk.stratum() < e.k && walk.begin() < at + n;
       walk.next()) {
    const uint64_t i = walk.chosen(draws) - at;  // the first stratum may have chosen before `at`
    if (i < n) out[i] = load_as<float>(bytes + e.codes + 4 * walk.stratum());
  }
}

/// Elements [at, at + n) of a piece; `at` is a multiple of kBlock and n at most kBlock.
inline void decode_block(const Encoding& e, const uint8_t* bytes, uint64_t at, std::size_t n,
                         float* out) {
  switch (e.kind) {
    case Kind::kNone: return;  // not coded: the caller reads it in its own dtype
    case Kind::kFp16: return decode_cast<CastF16>(bytes + 2 * at, n, out);
    case Kind::kBf16: return decode_cast<CastBf16>(bytes + 2 * at, n, out);
    case Kind::kFp8: return decode_codes<E4m3, Whole>(e, bytes, at, n, out);
    case Kind::kInt8: return decode_codes<Int8Code, Whole>(e, bytes, at, n, out);
    case Kind::kInt4: return decode_codes<Int4Code, Nibbles>(e, bytes, at, n, out);
    case Kind::kOnebit: return decode_codes<Onebit, Bits>(e, bytes, at, n, out);
    case Kind::kTernary: return decode_codes<TernaryCode, Pairs>(e, bytes, at, n, out);
    case Kind::kTopk: return decode_topk(e, bytes, at, n, out);
    case Kind::kRandk: return decode_randk(e, bytes, at, n, out);
  }
}

}  // namespace zps::ZPS_TARGET
