#include "core/pool.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/futex.h"

namespace zps {
namespace {

constexpr std::uint32_t kInside = 0x3ff;
constexpr std::uint32_t kOpen = 0x400;
constexpr std::uint32_t kStop = 0x800;
constexpr std::uint32_t kRound = 0x1000;

// Buckets follow each other closely, so one more is likely: cheaper to look than to sleep.
constexpr std::int64_t kSpinNs = 20'000;

std::uint32_t round_of(std::uint32_t state) { return state / kRound; }

void pause_some() {
  for (int i = 0; i < 16; ++i) cpu_pause();
}

}  // namespace

Pool::Pool(unsigned threads)
    : threads_(threads), owner_(getpid()), helpers_(new std::vector<std::thread>) {
  // Signals are for the threads that know what to do with them.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    for (unsigned i = 1; i < threads; ++i) helpers_->emplace_back([this] { help(); });
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    stop();
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Pool::~Pool() {
  if (!forked()) stop();
}

void Pool::stop() noexcept {
  // release: pairs with the acquire in help
  state_.fetch_or(kStop, std::memory_order_release);
  futex_wake(state_, Scope::kPrivate);
  for (std::thread& helper : *helpers_) helper.join();
  delete helpers_;
}

bool Pool::forked() const { return getpid() != owner_; }

void Pool::run(Body body, void* context, unsigned helpers) {
  if (helpers > threads_ - 1) helpers = threads_ - 1;
  if (helpers == 0) return body(context);

  const std::lock_guard<std::mutex> turn(turn_);
  body_ = body;
  context_ = context;
  // release: pairs with the acquire of a joining helper, which then sees body_ and context_
  state_.store(((round_of(state_.load(std::memory_order_relaxed)) + 1) * kRound) | kOpen,
               std::memory_order_release);
  futex_wake(state_, Scope::kPrivate, static_cast<int>(helpers));
  body(context);
  finish();
}

/// Closes the round and waits for the helpers inside.
void Pool::finish() noexcept {
  state_.fetch_and(~kOpen, std::memory_order_relaxed);
  const std::int64_t spin_until = now_ns() + kSpinNs;
  for (;;) {
    // acquire: left_ is read before state_, so a helper that leaves after the look at state_ has
    // not raised left_ yet, and the wait below does not miss it
    const std::uint32_t left = left_.load(std::memory_order_acquire);
    // acquire: pairs with the release of a leaving helper, whose writes the caller then sees
    if ((state_.load(std::memory_order_acquire) & kInside) == 0) return;
    if (now_ns() < spin_until) {
      pause_some();
    } else {
      futex_wait(left_, left, Scope::kPrivate);
    }
  }
}

void Pool::help() noexcept {
  std::uint32_t last_round = 0;
  std::int64_t spin_until = 0;
  for (;;) {
    // acquire: pairs with the release in run and in the destructor
    std::uint32_t state = state_.load(std::memory_order_acquire);
    if ((state & kStop) != 0) return;
    if ((state & kOpen) != 0 && round_of(state) != last_round) {
      // acquire: as above; a round that closed or changed since fails the exchange
      if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire)) continue;
      body_(context_);
      last_round = round_of(state);
      // release: pairs with the acquire in finish
      state = state_.fetch_sub(1, std::memory_order_release) - 1;
      if ((state & (kOpen | kInside)) == 0) {
        left_.fetch_add(1, std::memory_order_relaxed);
        futex_wake(left_, Scope::kPrivate, 1);
      }
      spin_until = now_ns() + kSpinNs;
    } else if (now_ns() < spin_until) {
      pause_some();
    } else {
      futex_wait(state_, state, Scope::kPrivate);
    }
  }
}

}  // namespace zps
