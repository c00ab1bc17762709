// What the code outside the kernels must know of a rule. One source of truth: the rules' headers.
#pragma once

#include <string>
#include <vector>

#include "core/work.h"

namespace zps {

struct RuleFacts {
  Rule rule;
  const char* name;
  std::vector<std::string> hypers;  // the columns of Work::hypers
  std::vector<std::string> states;  // the order of Work::states
};

const std::vector<RuleFacts>& rule_facts();

/// Bit i is set if the rule touches state i under these hyperparameters.
unsigned states_used(Rule rule, const double* hyper);

}  // namespace zps
