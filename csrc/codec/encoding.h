// Where everything lies in an encoded piece. Sizes follow from codec and length alone: nothing in
// the data decides how long it is. Little-endian; scales first, then codes.
//
//   fp16 bf16                    n uint16
//   fp8 int8 int4 ternary onebit one float32 scale a block, then n codes of 8 8 4 2 1 bits
//   topk   uint32 offsets[tiles + 1], uint16 indices[k] padded to 4 bytes, values[k]; the entries of
//          tile t are offsets[t] .. offsets[t + 1], their indices count from the tile's first
//   randk  uint64 seed, float32 values[k]; stratum j holds elements floor(j n / k) onwards
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/work.h"

namespace zps {

/// Elements of a tile of topk's indices.
constexpr std::uint64_t kIndexTile = 4096;

/// Elements that topk and randk can count.
constexpr std::uint64_t kMostSparse = 0xffffffffu;

/// Elements that topk takes together in one pass, and as one draw of its sample.
constexpr std::uint64_t kSelectUnit = 512;
constexpr std::uint64_t kRun = 16;

/// Draws of topk's sample: about one element in 64, and enough of them to be of use.
inline std::uint64_t sampled_runs(std::uint64_t n) {
  const std::uint64_t runs = n / (64 * kRun);
  return runs < 128 ? 128 : runs;
}

/// Candidates that topk keeps at a time: enough to seldom cut them down.
inline std::uint64_t candidate_room(const Encoding& e) {
  const std::uint64_t most = 2 * e.k + 8192;
  return (e.n < most ? e.n : most) + kSelectUnit;
}

/// Words of memory that encoding takes beside its output.
inline std::uint64_t scratch_words(const Encoding& e) {
  return e.kind == Kind::kTopk ? 2 * candidate_room(e) + sampled_runs(e.n) * kRun : 0;
}

/// Throws std::invalid_argument for a codec that does not exist or options out of their range.
Encoding encoding_of(const Codec& codec, std::uint64_t n, std::uint64_t itemsize);

/// What is wrong with an encoded piece that nobody else writes to any more; nullptr: nothing.
/// Everything but topk's offsets and indices is valid whatever it is.
const char* check(const Encoding& encoding, const void* bytes);

}  // namespace zps
