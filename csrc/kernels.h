// What each instruction set provides. kernels.inc.h is compiled once per target, in the target's
// own namespace; dispatch.h picks one table at run time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/work.h"

namespace zps {

/// Elements of a tile, the unit in which work is cut. Sums of squares are added tile by tile, so
/// this number is part of their value.
constexpr std::size_t kTile = 4096;

/// Streams of memory for the roofline: each write stream is read, added to and written.
struct Streams {
  static constexpr int kMost = 8;
  const float* reads[kMost];
  float* writes[kMost];
  int read_count, write_count;
  std::size_t block;  // elements, the shape of the loop
};

/// One piece on its way into a slot or a message.
struct EncodeCall {
  Encoding encoding;
  Dtype dtype;               // of source and sent
  const void* source;        // the gradient; of a delta, the values now
  void* sent;                // the values that the other side holds; nullptr: source is a gradient
  const float* residual_in;  // nullptr: nothing was lost before
  float* residual_out;       // nullptr: what is lost is lost
  float residual_factor;
  std::uint64_t seed;
  std::uint8_t* out;
  std::uint32_t* scratch;  // scratch_words(encoding)
};

/// One piece on its way back.
struct DecodeCall {
  Encoding encoding;
  const std::uint8_t* bytes;
  void* out;
  Dtype dtype;
  bool add;
};

/// The roofline of codecs: streams of any width. Every unit reads and writes whole cache lines.
struct Moves {
  static constexpr int kMost = 8;
  struct Stream {
    std::uint8_t* bytes;
    std::size_t unit;  // bytes a unit, a multiple of 64
  };
  Stream reads[kMost], writes[kMost];
  int read_count, write_count;
};

struct Kernels {
  /// Average, then the rule, then the published copy, for elements [begin, end) of a segment.
  void (*apply)(const Work&, const Segment&, std::uint64_t begin, std::uint64_t end);

  /// The averaged gradient of elements [begin, end) into out[begin, end).
  void (*reduce)(const Work&, const Segment&, std::uint64_t begin, std::uint64_t end, float* out);

  /// Sum of squares of the averaged gradient of at most one tile.
  double (*norm_sq)(const Work&, const Segment&, std::uint64_t begin, std::uint64_t end);

  /// Copies n elements to dst (nullptr: only looks) and returns their sum of squares, which is
  /// finite if and only if every element is: a double holds the square of any float.
  double (*copy)(const void* src, void* dst, std::uint64_t n, Dtype);

  /// Encodes one piece with any codec but none, and keeps what was lost. Returns the sum of squares
  /// of the gradient, or of the delta: the value that copy returns, bit for bit.
  double (*encode)(const EncodeCall&);

  /// Decodes one piece, over the output or added to it.
  void (*decode)(const DecodeCall&);

  /// Adds the sum of the read streams to every write stream, over the whole blocks of
  /// [begin, end). False, and nothing is done, if this mix or block was not compiled.
  bool (*stream)(const Streams&, std::uint64_t begin, std::uint64_t end);

  /// Reads units [begin, end) of every read stream and writes those of every write stream.
  void (*move)(const Moves&, std::uint64_t begin, std::uint64_t end);
};

namespace base {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

}  // namespace zps
