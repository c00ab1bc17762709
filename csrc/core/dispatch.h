// Which instruction set runs.
#pragma once

#include <vector>

#include "kernels.h"

namespace zps {

struct Target {
  const char* name;
  const Kernels* kernels;
};

/// The targets this CPU can run, best first; the last is always "base".
inline std::vector<Target> targets() {
  std::vector<Target> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    found.push_back({"avx512", &avx512::kernels});
  }
  if (__builtin_cpu_supports("avx2")) found.push_back({"avx2", &avx2::kernels});
#endif
  found.push_back({"base", &base::kernels});
  return found;
}

}  // namespace zps
