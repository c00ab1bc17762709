// A thread pool that costs nothing while idle and never holds up its caller.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace zps {

/// The caller and threads - 1 helpers. Work is handed out inside the body, by an atomic counter of
/// its own: the caller starts at once, helpers join as they wake, and one that wakes after the work
/// is done is not waited for.
class Pool {
 public:
  using Body = void (*)(void* context) noexcept;

  explicit Pool(unsigned threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  unsigned threads() const { return threads_; }

  /// True in a child of the process that made the pool: the helpers are not there.
  bool forked() const;

  /// Wakes up to `helpers` helpers and calls body(context) on the caller and on each helper that
  /// comes in time; returns when every call has. Callers on several threads take turns.
  void run(Body body, void* context, unsigned helpers);

 private:
  void help() noexcept;
  void finish() noexcept;
  void stop() noexcept;

  const unsigned threads_;
  const int owner_;
  std::mutex turn_;
  Body body_ = nullptr;     // written by run before it opens a round, read by helpers that joined
  void* context_ = nullptr;

  // One word, so that joining and closing exclude each other: helpers inside (low bits), open,
  // stop, then the number of the round.
  std::atomic<std::uint32_t> state_{0};
  std::atomic<std::uint32_t> left_{0};  // rises when the last helper leaves a closed round

  std::vector<std::thread>* helpers_;   // leaked in a forked child, where joining would hang
};

}  // namespace zps
