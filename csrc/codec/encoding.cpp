#include "codec/encoding.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace zps {
namespace {

/// Bits of a code; 0: the codec has no scales.
unsigned code_bits(Kind kind) {
  switch (kind) {
    case Kind::kFp8:
    case Kind::kInt8: return 8;
    case Kind::kInt4: return 4;
    case Kind::kTernary: return 2;
    case Kind::kOnebit: return 1;
    default: return 0;
  }
}

std::uint32_t log2_of(std::uint32_t block) {
  std::uint32_t shift = 4;
  while (shift < 12 && (1u << shift) != block) ++shift;
  if ((1u << shift) != block) {
    throw std::invalid_argument("a block is a power of two from 16 to 4096");
  }
  return shift;
}

std::uint64_t entries(double ratio, std::uint64_t n) {
  if (!(ratio > 0.0 && ratio <= 1.0)) throw std::invalid_argument("a ratio is above 0, at most 1");
  if (n > kMostSparse) throw std::invalid_argument("a sparse piece has fewer than 2**32 elements");
  const double wanted = std::ceil(ratio * static_cast<double>(n));
  return std::min(n, std::max<std::uint64_t>(1, static_cast<std::uint64_t>(wanted)));
}

template <class T>
T load(const void* bytes, std::uint64_t index) {
  T value;
  std::memcpy(&value, static_cast<const char*>(bytes) + index * sizeof(T), sizeof(T));
  return value;
}

}  // namespace

Encoding encoding_of(const Codec& codec, std::uint64_t n, std::uint64_t itemsize) {
  Encoding e{};
  e.kind = codec.kind;
  e.flags = codec.flags;
  e.n = n;
  switch (codec.kind) {
    case Kind::kNone: e.nbytes = n * itemsize; return e;
    case Kind::kFp16:
    case Kind::kBf16: e.nbytes = 2 * n; return e;
    case Kind::kTopk: {
      const std::uint64_t tiles = (n + kIndexTile - 1) / kIndexTile;
      e.k = entries(codec.ratio, n);
      e.codes = 4 * (tiles + 1);
      e.values = e.codes + (2 * e.k + 3) / 4 * 4;
      e.nbytes = e.values + e.k * ((codec.flags & kHalfValues) != 0 ? 2 : 4);
      return e;
    }
    case Kind::kRandk:
      e.k = entries(codec.ratio, n);
      e.codes = 8;
      e.nbytes = e.codes + 4 * e.k;
      return e;
    default: break;
  }
  const unsigned bits = code_bits(codec.kind);
  if (bits == 0) throw std::invalid_argument("no codec has this id");
  e.shift = log2_of(codec.block);
  e.codes = 4 * ((n + codec.block - 1) >> e.shift);
  e.nbytes = e.codes + (n * bits + 7) / 8;
  return e;
}

const char* check(const Encoding& encoding, const void* bytes) {
  if (encoding.kind != Kind::kTopk) return nullptr;
  const void* indices = static_cast<const char*>(bytes) + encoding.codes;
  std::uint32_t from = load<std::uint32_t>(bytes, 0);
  if (from != 0) return "the first offset of topk is not 0";
  for (std::uint64_t first = 0, tile = 1; first < encoding.n; first += kIndexTile, ++tile) {
    const std::uint32_t to = load<std::uint32_t>(bytes, tile);
    if (to < from) return "the offsets of topk fall";
    if (to > encoding.k) return "an offset of topk is more than k";
    const std::int64_t end = static_cast<std::int64_t>(std::min(kIndexTile, encoding.n - first));
    std::int64_t last = -1;
    for (; from < to; ++from) {
      const std::int64_t index = load<std::uint16_t>(indices, from);
      if (index >= end) return "an index of topk lies outside of its tile";
      if (index <= last) return "the indices of a tile of topk do not rise";
      last = index;
    }
  }
  return nullptr;
}

}  // namespace zps
