// Version words in shared memory, and the futex that announces them: one poster, many waiters in
// many processes, whose mapping may be read-only.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace zps {

using Word32 = std::atomic<std::uint32_t>;
using Word64 = std::atomic<std::uint64_t>;
static_assert(Word32::is_always_lock_free && Word64::is_always_lock_free);
static_assert(sizeof(Word32) == 4 && sizeof(Word64) == 8);

enum class Waited : int { kReached, kMail, kTimeout };

struct Wish {
  const Word64* words;
  const std::uint32_t* index;  // words[index[i]] >= targets[i] for every i < count
  const std::uint64_t* targets;
  std::size_t count;
  const Word32* mail;  // nullptr: none
  std::uint32_t mail_seen;
};

/// Returns once the wish holds, the mail word differs from mail_seen, or the timeout has passed,
/// looking in that order. Spins for spin_ns, then sleeps on the signal.
Waited wait(const Word32& signal, const Wish& wish, std::int64_t spin_ns, std::int64_t timeout_ns);

/// Stores words[index[i]] = values[i], then raises the signal and wakes every waiter.
void post(Word32& signal, Word64* words, const std::uint32_t* index, const std::uint64_t* values,
          std::size_t count);

}  // namespace zps
