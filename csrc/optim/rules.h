// From a Rule to its update: the one place that lists every rule.
#pragma once

#include "core/work.h"
#include "optim/adagrad.h"
#include "optim/adam.h"
#include "optim/builtin.h"
#include "optim/lion.h"
#include "optim/rmsprop.h"
#include "optim/sgd.h"

namespace zps::ZPS_TARGET {

template <class Visit>
void with_update(Rule rule, const double* hyper, int64_t step, double lr_factor,
                 const Visit& visit) {
  switch (rule) {
    case Rule::kSum:
    case Rule::kMean:
    case Rule::kAssign: return visit(Replace{});
    case Rule::kAdd: return visit(Accumulate{});
    case Rule::kSgd: return Sgd::prepare(hyper, step, lr_factor, visit);
    case Rule::kAdam: return Adam::prepare(hyper, step, lr_factor, visit);
    case Rule::kAdagrad: return Adagrad::prepare(hyper, step, lr_factor, visit);
    case Rule::kRmsprop: return Rmsprop::prepare(hyper, step, lr_factor, visit);
    case Rule::kLion: return Lion::prepare(hyper, step, lr_factor, visit);
  }
}

}  // namespace zps::ZPS_TARGET
