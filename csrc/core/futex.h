// Linux futexes, and the pause between two looks at a word.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

namespace zps {

/// Whose threads share the word: those of one process, or of every process that maps it.
enum class Scope { kPrivate, kShared };

/// Sleeps while *word == seen, until a wake or the timeout (nullptr: none), or for no reason at
/// all: look again. The word may lie in a read-only mapping.
inline void futex_wait(const std::atomic<std::uint32_t>& word, std::uint32_t seen, Scope scope,
                       const timespec* timeout = nullptr) {
  const int private_flag = scope == Scope::kPrivate ? FUTEX_PRIVATE_FLAG : 0;
  syscall(SYS_futex, &word, FUTEX_WAIT | private_flag, seen, timeout, nullptr, 0);
}

inline void futex_wake(const std::atomic<std::uint32_t>& word, Scope scope, int count = INT_MAX) {
  const int private_flag = scope == Scope::kPrivate ? FUTEX_PRIVATE_FLAG : 0;
  syscall(SYS_futex, &word, FUTEX_WAKE | private_flag, count, nullptr, nullptr, 0);
}

/// Lets the other hardware thread run for a moment.
inline void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace zps
