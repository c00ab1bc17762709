// topk: the k largest magnitudes in one pass.
//
// A deterministic sample gives a threshold that somewhat more than k elements should pass. One pass
// in index order collects those that do; whenever the room for them is full, all but the k largest
// are dropped and the threshold rises to the smallest that is left, so that nothing which belongs to
// the k largest is ever lost. At the end the candidates are cut down to the k largest, ties to the
// lower index. Only if the sample misled, and too few passed, is there a second pass without a
// threshold: when any is missing if `exact` is set, otherwise when an eighth of k is.
#pragma once

#include "codec/bytes.h"
#include "codec/encoding.h"
#include "codec/randk.h"
#include "codec/topk.h"
#include "flow.inc.h"

namespace zps::ZPS_TARGET {

constexpr uint64_t kSampledAbove = 4096;

/// The rank-th largest of some sizes, from 1: three rounds of counting digits.
inline uint32_t ranked(const uint32_t* bits, uint64_t count, uint64_t rank) {
  constexpr int kShifts[] = {21, 10, 0};
  constexpr uint32_t kDigits[] = {1024, 2048, 1024};
  uint32_t found = 0, known = 0x80000000u;  // the sign bit is not looked at
  for (int round = 0; round < 3; ++round) {
    uint32_t counts[2048] = {};
    const uint32_t mask = kDigits[round] - 1;
    for (uint64_t i = 0; i < count; ++i) {
      const uint32_t size = bits[i] & 0x7fffffffu;
      if ((size & known) == found) ++counts[size >> kShifts[round] & mask];
    }
    uint32_t digit = mask;
    for (; digit > 0 && rank > counts[digit]; --digit) rank -= counts[digit];
    found |= digit << kShifts[round];
    known |= mask << kShifts[round];
  }
  return found;
}

/// The elements that may be among the k largest, in index order.
struct Candidates {
  uint64_t k, room, count;
  uint32_t least;  // only larger sizes enter
  uint32_t* index;
  uint32_t* bits;  // of the float

  /// Room for one more unit.
  void make_room() {
    if (count + kSelectUnit > room) cut();
  }

  /// Leaves the k largest; of equal ones those of the lowest index.
  void cut() {
    if (count <= k) return;
    const uint32_t last = ranked(bits, count, k);
    uint64_t larger = 0;
    for (uint64_t i = 0; i < count; ++i) larger += (bits[i] & 0x7fffffffu) > last ? 1 : 0;
    uint64_t equals = k - larger, kept = 0;
    for (uint64_t i = 0; i < count; ++i) {
      const uint32_t size = bits[i] & 0x7fffffffu;
      const bool stays = size > last || (size == last && equals > 0);
      equals -= stays && size == last ? 1 : 0;
      index[kept] = index[i];
      bits[kept] = bits[i];
      kept += stays ? 1 : 0;
    }
    count = kept;
    least = last;
  }

  void add_unit(uint64_t at, std::size_t n, const float* v) {
    alignas(8) uint8_t passes[kSelectUnit];
    const auto limit = static_cast<int32_t>(least);
    for (std::size_t i = 0; i < n; ++i) {
      passes[i] = static_cast<int32_t>(size_of_value(v[i])) > limit ? 1 : 0;
    }
    for (std::size_t i = n; i % 8 != 0; ++i) passes[i] = 0;
    for (std::size_t i = 0; i < n; i += 8) {
      for (auto word = load_as<uint64_t>(passes + i); word != 0; word &= word - 1) {
        const std::size_t hit = i + static_cast<unsigned>(__builtin_ctzll(word)) / 8;
        index[count] = static_cast<uint32_t>(at + hit);
        bits[count] = bits_of(v[hit]);
        ++count;
      }
    }
  }
};

/// A size that somewhat more than k elements reach, as far as a sample can tell; 0: unknown.
inline uint32_t sampled_threshold(const EncodeCall& call, const Flow& flow, uint32_t* sample) {
  const Encoding& e = call.encoding;
  if (e.n <= kSampledAbove) return 0;
  const uint64_t runs = sampled_runs(e.n);
  const double expected = static_cast<double>(e.k) * static_cast<double>(runs * kRun) /
                          static_cast<double>(e.n);
  // The number above a threshold scatters by its root, and more where neighbours are alike.
  const auto rank = static_cast<uint64_t>(expected + 4.0 * sqrt(expected) + 8.0);
  if (rank > runs * kRun) return 0;
  const Strata strata = {e.n, runs};
  const Draws draws = Draws::of(e.n);  // places that no period of the data follows
  double unused[kLanes] = {};
  for (uint64_t run = 0; run < runs; ++run) {
    const uint64_t begin = strata.begin(run);
    const auto starts = static_cast<uint32_t>(strata.begin(run + 1) - begin - kRun + 1);
    float v[kRun];
    flow.load(call, begin + draws.bits(static_cast<uint32_t>(run)) % starts, kRun, v, unused);
    for (uint64_t i = 0; i < kRun; ++i) sample[run * kRun + i] = bits_of(v[i]);
  }
  const uint32_t size = ranked(sample, runs * kRun, rank);
  return size == 0 ? 0 : size - 1;  // it has to be reached, not passed
}

inline double collect(const EncodeCall& call, Candidates& candidates) {
  candidates.count = 0;
  const double sum = for_units(call, kSelectUnit,
                               [&](const Flow& flow, uint64_t at, std::size_t n, const float* v) {
    flow.keep(call, at, n, v);
    candidates.make_room();
    candidates.add_unit(at, n, v);
  });
  candidates.cut();
  return sum;
}

inline void write_values(const EncodeCall& call, const Flow& flow, const Candidates& sent) {
  const Encoding& e = call.encoding;
  const bool half = (e.flags & kHalfValues) != 0;
  uint8_t* values = call.out + e.values;
  for (uint64_t i = 0; i < sent.count; ++i) {
    const float v = float_of(sent.bits[i]);
    const uint16_t narrow = CastF16::store(v);
    half ? store_as<uint16_t>(values + 2 * i, narrow) : store_as<float>(values + 4 * i, v);
    flow.patch(call, sent.index[i], v, half ? CastF16::load(narrow) : v);
  }
  const uint64_t used = sent.count * (half ? 2 : 4);
  memset(values + used, 0, e.nbytes - e.values - used);
}

inline void write_indices(const EncodeCall& call, const Candidates& sent) {
  const Encoding& e = call.encoding;
  uint8_t* indices = call.out + e.codes;
  uint64_t i = 0;
  for (uint64_t tile = 0; tile * kIndexTile < e.n; ++tile) {
    store_as<uint32_t>(call.out + 4 * tile, static_cast<uint32_t>(i));
    for (; i < sent.count && sent.index[i] >> kTileShift == tile; ++i) {
      store_as<uint16_t>(indices + 2 * i, static_cast<uint16_t>(sent.index[i] % kIndexTile));
    }
  }
  store_as<uint32_t>(indices - 4, static_cast<uint32_t>(sent.count));
  memset(indices + 2 * sent.count, 0, e.values - e.codes - 2 * sent.count);
}

inline double encode_topk(const EncodeCall& call) {
  const Encoding& e = call.encoding;
  const uint64_t room = candidate_room(e);
  Candidates found = {e.k, room, 0, 0, call.scratch, call.scratch + room};
  const Flow flow = flow_of(call);
  found.least = sampled_threshold(call, flow, call.scratch + 2 * room);
  const bool guessed = found.least != 0;
  const uint64_t enough = (e.flags & kExact) != 0 ? e.k : e.k - e.k / 8;
  double sum = collect(call, found);
  if (guessed && found.count < enough) {
    found.least = 0;
    sum = collect(call, found);
  }
  write_indices(call, found);
  write_values(call, flow, found);
  return sum;
}

}  // namespace zps::ZPS_TARGET
