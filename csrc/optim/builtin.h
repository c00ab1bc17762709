// Rules without hyperparameters: sum, mean and assign replace the value by what was gathered,
// add adds to it. They differ in what is gathered: see Job::set_round.
#pragma once

#include "optim/target.h"

namespace zps::ZPS_TARGET {

struct Replace {
  static constexpr unsigned kStates = 0b0;
  ZPS_HD void operator()(float& weight, float grad, float*) const { weight = grad; }
};

struct Accumulate {
  static constexpr unsigned kStates = 0b0;
  ZPS_HD void operator()(float& weight, float grad, float*) const { weight += grad; }
};

}  // namespace zps::ZPS_TARGET
