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
const std::vector<Target>& targets();

}  // namespace zps
