#include "core/engine.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <stdexcept>

#include "codec/encoding.h"
#include "core/float_mode.h"
#include "core/seqlock.h"

namespace zps {
namespace {

/// A run of whole tiles of one segment: what a thread takes at a time.
struct Chunk {
  std::uint32_t job;
  const Segment* segment;
  std::uint64_t begin, end;  // elements, relative to the bucket
};
using Chunks = std::vector<Chunk>;

constexpr std::uint64_t kChunk = 8 * kTile;  // large enough to hide the counter, small to balance

// Less than this is done before a sleeping helper would have woken.
constexpr std::uint64_t kInline = 8 * kTile;

constexpr std::uint64_t kMoved = 64;  // units of a Moves that a thread takes at a time

void cut(std::uint32_t job, const Segment& segment, std::uint64_t size, Chunks& chunks) {
  const std::uint64_t end = segment.begin + segment.count;
  for (std::uint64_t at = segment.begin; at < end; at += size) {
    chunks.push_back({job, &segment, at, std::min(at + size, end)});
  }
}

Chunks cut(const Jobs& jobs, std::uint64_t size) {
  Chunks chunks;
  for (std::uint32_t job = 0; job < jobs.size(); ++job) {
    const std::int64_t* steps = jobs[job]->work().steps;
    for (const Segment& segment : jobs[job]->segments()) {
      if (steps[segment.param] != 0) cut(job, segment, size, chunks);
    }
  }
  return chunks;
}

/// Calls visit(chunk index) once for every chunk, on the threads of the pool.
template <class Visit>
class Sweep {
 public:
  Sweep(const Chunks& chunks, const Visit& visit) : chunks_(chunks), visit_(visit) {}

  void run(Pool& pool) {
    std::uint64_t elements = 0;
    for (const Chunk& chunk : chunks_) elements += chunk.end - chunk.begin;
    const std::uint64_t useful = elements <= kInline ? 1 : chunks_.size();
    pool.run(&Sweep::body, this,
             static_cast<unsigned>(std::min<std::uint64_t>(useful, pool.threads()) - 1));
  }

 private:
  static void body(void* self) noexcept { static_cast<Sweep*>(self)->take_all(); }

  void take_all() noexcept {
    const DefaultFloatMode mode;
    for (;;) {
      // relaxed: only the number matters; the pool orders what was written
      const std::size_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= chunks_.size()) return;
      visit_(index);
    }
  }

  const Chunks& chunks_;
  const Visit& visit_;
  std::atomic<std::size_t> next_{0};
};

template <class Visit>
void sweep(Pool& pool, const Chunks& chunks, const Visit& visit) {
  if (!chunks.empty()) Sweep<Visit>(chunks, visit).run(pool);
}

/// Calls visit(begin, end) for every chunk of [0, n).
template <class Visit>
void sweep_range(Pool& pool, std::uint64_t n, std::uint64_t size, const Visit& visit) {
  Segment whole{};
  whole.count = n;
  Chunks chunks;
  cut(0, whole, size, chunks);
  sweep(pool, chunks, [&](std::size_t index) { visit(chunks[index].begin, chunks[index].end); });
}

/// Opens and closes one job's seqlock around all of its chunks.
struct Guard {
  explicit Guard(Word64* word) : writer(word) {}
  SeqWriter writer;
  std::atomic<std::uint32_t> chunks_left{0};
};

}  // namespace

void apply(Pool& pool, const Kernels& kernels, const Jobs& jobs) {
  const Chunks chunks = cut(jobs, kChunk);
  std::deque<Guard> guards;  // a deque, because an atomic does not move
  for (const Job* job : jobs) guards.emplace_back(job->seq());
  for (const Chunk& chunk : chunks) ++guards[chunk.job].chunks_left;
  for (Guard& guard : guards) {
    if (guard.chunks_left == 0) guard.writer.close();  // nothing to write; still a version
  }
  sweep(pool, chunks, [&](std::size_t index) {
    const Chunk& chunk = chunks[index];
    Guard& guard = guards[chunk.job];
    guard.writer.open();
    kernels.apply(jobs[chunk.job]->work(), *chunk.segment, chunk.begin, chunk.end);
    // acq_rel: the thread that takes the last one sees every other thread's writes, so that the
    // close publishes them all
    if (guard.chunks_left.fetch_sub(1, std::memory_order_acq_rel) == 1) guard.writer.close();
  });
}

void reduce(Pool& pool, const Kernels& kernels, const Jobs& jobs, const std::vector<float*>& outs) {
  const Chunks chunks = cut(jobs, kChunk);
  sweep(pool, chunks, [&](std::size_t index) {
    const Chunk& chunk = chunks[index];
    kernels.reduce(jobs[chunk.job]->work(), *chunk.segment, chunk.begin, chunk.end, outs[chunk.job]);
  });
}

double norm_sq(Pool& pool, const Kernels& kernels, const Jobs& jobs) {
  // One partial sum a tile, added in tile order: the same for any number of threads.
  const Chunks tiles = cut(jobs, kTile);
  std::vector<double> partial(tiles.size());
  sweep(pool, tiles, [&](std::size_t index) {
    const Chunk& tile = tiles[index];
    partial[index] = kernels.norm_sq(jobs[tile.job]->work(), *tile.segment, tile.begin, tile.end);
  });
  double total = 0.0;
  for (const double sum : partial) total += sum;
  return total;
}

void stream(Pool& pool, const Kernels& kernels, const Streams& streams, std::uint64_t n) {
  if (!kernels.stream(streams, 0, 0)) {
    throw std::invalid_argument("no stream kernel has this mix of reads and writes, or this block");
  }
  sweep_range(pool, n, kChunk, [&](std::uint64_t begin, std::uint64_t end) {
    kernels.stream(streams, begin, end);
  });
}

void move(Pool& pool, const Kernels& kernels, const Moves& moves, std::uint64_t units) {
  sweep_range(pool, units, kMoved, [&](std::uint64_t begin, std::uint64_t end) {
    kernels.move(moves, begin, end);
  });
}

double encode(const Kernels& kernels, EncodeCall call) {
  const DefaultFloatMode mode;
  thread_local std::vector<std::uint32_t> scratch;  // gradients come one after another
  const std::uint64_t words = scratch_words(call.encoding);
  if (scratch.size() < words) scratch.resize(words);
  call.scratch = scratch.data();
  return kernels.encode(call);
}

void decode(const Kernels& kernels, const DecodeCall& call) {
  const DefaultFloatMode mode;
  kernels.decode(call);
}

}  // namespace zps
