// randk: one element of each of k strata, chosen by a seed. Sorted and distinct by construction, so
// that the seed stands for all indices. Source: Stich et al., Sparsified SGD with Memory (2018).
#pragma once

#include "codec/hash.h"

namespace zps::ZPS_TARGET {

/// k strata over n elements, 1 <= k <= n < 2**32: stratum j begins at floor(j * n / k).
struct Strata {
  uint64_t n, k;

  ZPS_HD uint64_t begin(uint64_t stratum) const { return stratum * n / k; }

  /// The stratum that holds an element.
  ZPS_HD uint64_t of(uint64_t element) const { return ((element + 1) * k - 1) / n; }
};

/// Walks the strata in order without a division for each.
class Walk {
 public:
  ZPS_HD Walk(const Strata& strata, uint64_t stratum)
      : stratum_(stratum),
        begin_(strata.begin(stratum)),
        whole_(strata.n / strata.k),
        rest_(strata.n % strata.k),
        k_(strata.k) {
    over_ = stratum * strata.n - begin_ * k_;
    step();
  }

  ZPS_HD uint64_t stratum() const { return stratum_; }
  ZPS_HD uint64_t begin() const { return begin_; }
  ZPS_HD uint32_t length() const { return static_cast<uint32_t>(end_ - begin_); }

  /// The element chosen here: always one of this stratum, whatever the seed.
  ZPS_HD uint64_t chosen(const Draws& draws) const {
    return begin_ + draws.bits(static_cast<uint32_t>(stratum_)) % length();
  }

  ZPS_HD void next() {
    ++stratum_;
    begin_ = end_;
    step();
  }

 private:
  ZPS_HD void step() {
    over_ += rest_;
    end_ = begin_ + whole_;
    if (over_ >= k_) {
      over_ -= k_;
      ++end_;
    }
  }

  uint64_t stratum_, begin_, end_ = 0;
  uint64_t whole_, rest_, k_;
  uint64_t over_;  // stratum * n mod k, of the stratum that comes next
};

}  // namespace zps::ZPS_TARGET
