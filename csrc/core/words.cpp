#include "core/words.h"

#include "core/clock.h"
#include "core/futex.h"

namespace zps {
namespace {

bool holds(const Wish& wish) {
  for (std::size_t i = 0; i < wish.count; ++i) {
    // acquire: pairs with the release in post; what was written before it is visible
    if (wish.words[wish.index[i]].load(std::memory_order_acquire) < wish.targets[i]) return false;
  }
  return true;
}

bool has_mail(const Wish& wish) {
  // acquire: pairs with the release of whoever raises the word
  return wish.mail != nullptr && wish.mail->load(std::memory_order_acquire) != wish.mail_seen;
}

}  // namespace

Waited wait(const Word32& signal, const Wish& wish, std::int64_t spin_ns, std::int64_t timeout_ns) {
  const std::int64_t start = now_ns();
  for (;;) {
    // acquire: pairs with the release in post. The signal is read before the words: words posted
    // after this look have raised it, and the futex does not sleep on a signal that has moved.
    const std::uint32_t seen = signal.load(std::memory_order_acquire);
    if (holds(wish)) return Waited::kReached;
    if (has_mail(wish)) return Waited::kMail;
    const std::int64_t passed = now_ns() - start;
    if (passed >= timeout_ns) return Waited::kTimeout;
    if (passed < spin_ns) {
      cpu_pause();
      continue;
    }
    const std::int64_t rest = timeout_ns - passed;
    const timespec timeout = {rest / 1'000'000'000, rest % 1'000'000'000};
    futex_wait(signal, seen, Scope::kShared, &timeout);
  }
}

void post(Word32& signal, Word64* words, const std::uint32_t* index, const std::uint64_t* values,
          std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    // release: pairs with the acquire in holds
    words[index[i]].store(values[i], std::memory_order_release);
  }
  // release: pairs with the acquire of the signal in wait
  signal.fetch_add(1, std::memory_order_release);
  futex_wake(signal, Scope::kShared);
}

}  // namespace zps
