#include "core/dispatch.h"

namespace zps {
namespace {

std::vector<Target> find_targets() {
  std::vector<Target> found;
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("f16c")) return {{"base", &base::kernels}};
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    found.push_back({"avx512", &avx512::kernels});
  }
  if (__builtin_cpu_supports("avx2")) found.push_back({"avx2", &avx2::kernels});
#endif
  found.push_back({"base", &base::kernels});
  return found;
}

}  // namespace

const std::vector<Target>& targets() {
  static const std::vector<Target> found = find_targets();
  return found;
}

}  // namespace zps
