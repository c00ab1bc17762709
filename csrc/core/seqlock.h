// One writer (several threads of it), any number of readers in any process: the word is odd while
// the bytes it guards are being written, and version * 2 when they are whole.
// Source: Boehm, Can Seqlocks Get Along With Programming Language Memory Models? (2012).
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#include "core/futex.h"
#include "core/words.h"

namespace zps {

class SeqWriter {
 public:
  /// word may be nullptr: nobody reads while we write.
  explicit SeqWriter(Word64* word)
      : word_(word), version_(word ? word->load(std::memory_order_relaxed) / 2 : 0) {}

  /// Before each thread's first write. All store the same number, so it does not matter who is
  /// first.
  void open() {
    if (word_ == nullptr) return;
    word_->store(version_ * 2 + 1, std::memory_order_relaxed);
    // release: pairs with the acquire fence in seq_read; a reader that saw one of the writes below
    // sees the odd number too
    std::atomic_thread_fence(std::memory_order_release);
  }

  /// Once, after the last write of the last thread.
  void close() {
    // release: pairs with the acquire load in seq_read
    if (word_ != nullptr) word_->store((version_ + 1) * 2, std::memory_order_release);
  }

 private:
  Word64* const word_;
  const std::uint64_t version_;
};

/// Copies the guarded bytes and returns their version, or -1 if `tries` looks found none at rest.
inline std::int64_t seq_read(const Word64& word, const void* source, void* out, std::size_t bytes,
                             std::uint64_t tries) {
  for (std::uint64_t attempt = 0; attempt < tries; ++attempt) {
    // acquire: pairs with the release in SeqWriter::close
    const std::uint64_t before = word.load(std::memory_order_acquire);
    if (before % 2 == 0) {
      // The copy may race with a writer. Its bytes are then torn, and thrown away.
      std::memcpy(out, source, bytes);
      // acquire: pairs with the release fence in SeqWriter::open
      std::atomic_thread_fence(std::memory_order_acquire);
      if (word.load(std::memory_order_relaxed) == before) {
        return static_cast<std::int64_t>(before / 2);
      }
    }
    cpu_pause();
    // Writing a bucket takes a while, and the writer may need this very core.
    if (attempt % 64 == 63) sched_yield();
  }
  return -1;
}

}  // namespace zps
