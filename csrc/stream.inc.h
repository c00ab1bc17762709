// The roofline: streams of memory read, added and written back, with as little arithmetic as there
// can be. The kernels are measured against it; see bench/kernels.py.
#pragma once

#include "kernels.h"

namespace zps::ZPS_TARGET {

/// Block is the shape: that many elements are read and summed before any is written. A vector or
/// two keeps every stream in step; more gives each a run of cache lines.
template <int Reads, int Writes, std::size_t Block>
void stream_blocks(const Streams& streams, std::uint64_t begin, std::uint64_t end) {
  const float* read[Reads];
  float* write[Writes];
  for (int k = 0; k < Reads; ++k) read[k] = streams.reads[k];
  for (int k = 0; k < Writes; ++k) write[k] = streams.writes[k];
  for (std::uint64_t at = begin; at + Block <= end; at += Block) {
    float sum[Block];
    for (std::size_t i = 0; i < Block; ++i) {
      sum[i] = read[0][at + i];
      for (int k = 1; k < Reads; ++k) sum[i] += read[k][at + i];
    }
    for (int k = 0; k < Writes; ++k) {
      for (std::size_t i = 0; i < Block; ++i) write[k][at + i] += sum[i];
    }
  }
}

template <int Reads, int Writes>
bool stream_shaped(const Streams& streams, std::uint64_t begin, std::uint64_t end) {
  switch (streams.block) {
    case 16: return stream_blocks<Reads, Writes, 16>(streams, begin, end), true;
    case 32: return stream_blocks<Reads, Writes, 32>(streams, begin, end), true;
    case 64: return stream_blocks<Reads, Writes, 64>(streams, begin, end), true;
    case 128: return stream_blocks<Reads, Writes, 128>(streams, begin, end), true;
    default: return false;
  }
}

inline bool stream(const Streams& streams, std::uint64_t begin, std::uint64_t end) {
  switch (streams.read_count * 10 + streams.write_count) {
    case 12: return stream_shaped<1, 2>(streams, begin, end);
    case 13: return stream_shaped<1, 3>(streams, begin, end);
    case 22: return stream_shaped<2, 2>(streams, begin, end);
    case 23: return stream_shaped<2, 3>(streams, begin, end);
    case 42: return stream_shaped<4, 2>(streams, begin, end);
    case 43: return stream_shaped<4, 3>(streams, begin, end);
    default: return false;
  }
}

/// A register of this target.
#if defined(__AVX512F__)
using Line = std::uint32_t __attribute__((vector_size(64)));
#elif defined(__AVX2__)
using Line = std::uint32_t __attribute__((vector_size(32)));
#else
using Line = std::uint32_t __attribute__((vector_size(16)));
#endif

inline void move(const Moves& moves, std::uint64_t begin, std::uint64_t end) {
  for (std::uint64_t unit = begin; unit < end; ++unit) {
    Line sum = {};
    for (int k = 0; k < moves.read_count; ++k) {
      const std::size_t bytes = moves.reads[k].unit;
      const std::uint8_t* from = moves.reads[k].bytes + unit * bytes;
      for (std::size_t i = 0; i < bytes; i += sizeof(Line)) {
        Line line;
        __builtin_memcpy(&line, from + i, sizeof line);
        sum ^= line;
      }
    }
    for (int k = 0; k < moves.write_count; ++k) {
      const std::size_t bytes = moves.writes[k].unit;
      std::uint8_t* to = moves.writes[k].bytes + unit * bytes;
      for (std::size_t i = 0; i < bytes; i += sizeof(Line)) {
        __builtin_memcpy(to + i, &sum, sizeof sum);
      }
    }
  }
}

}  // namespace zps::ZPS_TARGET
