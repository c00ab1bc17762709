// Rounds that need no decision: all workers have rung for the same one, and nothing else is new.
// They go by without the interpreter, until there is something to decide.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/engine.h"
#include "core/job.h"
#include "core/pool.h"
#include "core/words.h"

namespace zps {

/// A worker's page, in front of its bases: zps/memory/bell.py says what is in it. Whatever lies
/// there may change at any time.
struct Bell {
  Word64 rung;
  Word64 after;
  Word64 round;
  std::atomic<double> samples;
  std::atomic<double> grad_scale;
  Word64 flags;
  Word64 unused[2];
};
static_assert(sizeof(Bell) == 64 && std::atomic<double>::is_always_lock_free);

class Lane {
 public:
  struct Member {
    const Bell* bell;
    Word64* done;             // a word a bucket
    std::uint64_t heard = 0;  // the last sequence number that the hub knows of
  };

  struct Bucket {
    Job* job;  // loaded with the members' slots, in their order
    std::int64_t* steps;
    std::int64_t* next_steps;  // what the job reads
    std::size_t step_count;
  };

  /// When something happened in a round, in nanoseconds of the monotonic clock.
  struct Times {
    std::int64_t begin, applied, end;
  };

  /// divides: equal weights go into the mean as they are, for every rule but sum and add.
  Lane(Pool& pool, const Kernels& kernels, std::vector<Member> members,
       std::vector<Bucket> buckets, Word64* closed, Word32* signal, bool divides);

  /// Carries rounds out from `round` on, until a member rings for anything else than the next one,
  /// one of `elsewhere`, descriptors, becomes readable, a signal comes, or the time is over. Words
  /// from the doorway, a pipe, wake it. `heard` has what the hub knows of each member; see `members`
  /// for how far they have come.
  void run(std::uint64_t round, const std::vector<std::uint64_t>& heard, int doorway,
          const std::vector<int>& elsewhere, std::int64_t timeout_ns);

  const std::vector<Member>& members() const { return members_; }

  /// The rounds of the last run.
  const std::vector<Times>& times() const { return times_; }

 private:
  struct Ring {
    std::uint64_t seq;
    double samples, grad_scale;
  };
  enum class Look { kAll, kSome, kUnusual };

  Look look(std::uint64_t round);
  bool take(const Member& member, std::uint64_t round, std::uint64_t rung, Ring& ring) const;
  void carry_out(std::uint64_t round);
  void weigh();

  Pool& pool_;
  const Kernels& kernels_;
  std::vector<Member> members_;
  std::vector<Bucket> buckets_;
  Word64* closed_;
  Word32* signal_;
  const bool divides_;
  Jobs jobs_;
  std::vector<Ring> rings_;     // of the round that is under way
  std::vector<Ring> weighed_;   // whose weights the jobs have
  std::vector<Times> times_;
};

}  // namespace zps
