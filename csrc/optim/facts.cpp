#define ZPS_TARGET facts

#include "optim/facts.h"

#include <iterator>

#include "optim/rules.h"

namespace zps {
namespace {

template <class Described>
RuleFacts described(Rule rule, const char* name) {
  static_assert(std::size(Described::kHyperNames) == Described::kHypers);
  static_assert(std::size(Described::kStateNames) <= kMaxStates);
  return {rule,
          name,
          {std::begin(Described::kHyperNames), std::end(Described::kHyperNames)},
          {std::begin(Described::kStateNames), std::end(Described::kStateNames)}};
}

}  // namespace

const std::vector<RuleFacts>& rule_facts() {
  static const std::vector<RuleFacts> facts = {{Rule::kSum, "sum", {}, {}},
                                               {Rule::kMean, "mean", {}, {}},
                                               {Rule::kAssign, "assign", {}, {}},
                                               {Rule::kAdd, "add", {}, {}},
                                               described<facts::Sgd>(Rule::kSgd, "sgd"),
                                               described<facts::Adam>(Rule::kAdam, "adam"),
                                               described<facts::Adagrad>(Rule::kAdagrad, "adagrad"),
                                               described<facts::Rmsprop>(Rule::kRmsprop, "rmsprop"),
                                               described<facts::Lion>(Rule::kLion, "lion")};
  return facts;
}

unsigned states_used(Rule rule, const double* hyper) {
  unsigned used = 0;
  facts::with_update(rule, hyper, 1, 1.0, [&used](const auto& update) { used = update.kStates; });
  return used;
}

}  // namespace zps
