#include "core/lane.h"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "core/clock.h"
#include "core/futex.h"

namespace zps {
namespace {

constexpr std::uint64_t kFinite = 1;     // the only flag of a push without a question
constexpr int kOutcomeBits = 3;          // zps/memory/control.py; APPLIED is 0
constexpr std::uint64_t kMostSeq = std::uint64_t{1} << 60;

/// Whether the kernels, which compute in float32, can weight and divide by it. False for NaN.
bool in_range(double weight) { return weight >= 1e-30 && weight <= 1e30; }

/// Reads what is in the pipe, which says no more than that somebody has rung.
void drain(int doorway) {
  char words[4096];
  for (int most = 16; most > 0; --most) {  // as much as a pipe holds: it may be filled meanwhile
    if (read(doorway, words, sizeof words) < static_cast<ssize_t>(sizeof words)) return;
  }
}

/// relaxed: ordered by the acquire of `rung`, and only a copy is judged
template <class T>
T copy_of(const std::atomic<T>& word) {
  return word.load(std::memory_order_relaxed);
}

}  // namespace

Lane::Lane(Pool& pool, const Kernels& kernels, std::vector<Member> members,
           std::vector<Bucket> buckets, Word64* closed, Word32* signal, bool divides)
    : pool_(pool),
      kernels_(kernels),
      members_(std::move(members)),
      buckets_(std::move(buckets)),
      closed_(closed),
      signal_(signal),
      divides_(divides),
      rings_(members_.size()) {
  for (const Bucket& bucket : buckets_) jobs_.push_back(bucket.job);
}

void Lane::run(std::uint64_t round, const std::vector<std::uint64_t>& heard, int doorway,
               const std::vector<int>& elsewhere, std::int64_t timeout_ns) {
  for (std::size_t i = 0; i < members_.size(); ++i) members_[i].heard = heard[i];
  times_.clear();
  weighed_.clear();
  std::vector<pollfd> fds = {{doorway, POLLIN, 0}};
  for (const int fd : elsewhere) fds.push_back({fd, POLLIN, 0});
  const std::int64_t deadline = now_ns() + timeout_ns;
  for (;;) {
    const Look seen = look(round);
    if (seen == Look::kUnusual) return;
    if (seen == Look::kAll) carry_out(round++);
    const std::int64_t left_ns = deadline - now_ns();
    if (left_ns <= 0) return;
    const timespec left = {left_ns / 1'000'000'000, left_ns % 1'000'000'000};
    if (ppoll(fds.data(), fds.size(), &left, nullptr) < 0) return;  // a signal
    if (fds[0].revents != 0) drain(doorway);
    if (std::any_of(fds.begin() + 1, fds.end(), [](const pollfd& fd) { return fd.revents != 0; })) {
      return;
    }
  }
}

Lane::Look Lane::look(std::uint64_t round) {
  Look found = Look::kAll;
  for (std::size_t i = 0; i < members_.size(); ++i) {
    // acquire: pairs with the release of the worker that rings
    const std::uint64_t rung = members_[i].bell->rung.load(std::memory_order_acquire);
    if (rung <= members_[i].heard) {
      found = Look::kSome;
    } else if (!take(members_[i], round, rung, rings_[i])) {
      return Look::kUnusual;
    }
  }
  return found;
}

/// Takes a copy of a push, and judges that; false for one that the interpreter has to judge.
bool Lane::take(const Member& member, std::uint64_t round, std::uint64_t rung, Ring& ring) const {
  const Bell& bell = *member.bell;
  ring = {rung, copy_of(bell.samples), copy_of(bell.grad_scale)};
  if (rung >= kMostSeq || copy_of(bell.after) > member.heard) return false;
  if (copy_of(bell.round) != round || copy_of(bell.flags) != kFinite) return false;
  if (!in_range(ring.samples) || !in_range(ring.samples / ring.grad_scale)) return false;
  const auto* bases = reinterpret_cast<const Word64*>(&bell + 1);
  for (std::size_t i = 0; i < buckets_.size(); ++i) {
    // relaxed: the hub alone writes it
    if (copy_of(bases[i]) != buckets_[i].job->seq()->load(std::memory_order_relaxed) >> 1) {
      return false;
    }
  }
  return true;
}

void Lane::carry_out(std::uint64_t round) {
  const std::int64_t begin = now_ns();
  weigh();
  for (const Bucket& bucket : buckets_) {
    for (std::size_t i = 0; i < bucket.step_count; ++i) bucket.next_steps[i] = bucket.steps[i] + 1;
  }
  apply(pool_, kernels_, jobs_);
  const std::int64_t applied = now_ns();
  for (std::size_t b = 0; b < buckets_.size(); ++b) {
    const Bucket& bucket = buckets_[b];
    std::copy_n(bucket.next_steps, bucket.step_count, bucket.steps);
    // relaxed: ordered before the words that follow by their release
    closed_[b].store(round + 1, std::memory_order_relaxed);
  }
  for (std::size_t i = 0; i < members_.size(); ++i) {
    members_[i].heard = rings_[i].seq;
    for (std::size_t b = 0; b < buckets_.size(); ++b) {
      // release: pairs with the acquire in wait
      members_[i].done[b].store(rings_[i].seq << kOutcomeBits, std::memory_order_release);
    }
  }
  times_.push_back({begin, applied, now_ns()});
  // release: pairs with the acquire of the signal in wait
  signal_->fetch_add(1, std::memory_order_release);
  futex_wake(*signal_, Scope::kShared);
}

/// Weights as hub/store.py gives them: an even mean needs no multiplication.
void Lane::weigh() {
  const auto same = [](const Ring& a, const Ring& b) {
    return a.samples == b.samples && a.grad_scale == b.grad_scale;
  };
  if (std::equal(rings_.begin(), rings_.end(), weighed_.begin(), weighed_.end(), same)) return;
  weighed_ = rings_;
  const double first = rings_.front().samples;
  const bool even = divides_ && std::all_of(rings_.begin(), rings_.end(),
                                            [&](const Ring& r) { return r.samples == first; });
  std::vector<float> scales;
  double divisor = 0.0;
  for (const Ring& ring : rings_) {
    scales.push_back(static_cast<float>((even ? 1.0 : ring.samples) / ring.grad_scale));
    divisor += even ? 1.0 : ring.samples;
  }
  for (Job* job : jobs_) job->set_weights(scales, static_cast<float>(divisor));
}

}  // namespace zps
