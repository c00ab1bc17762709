// torch.optim.Adagrad.
#pragma once

#include "optim/target.h"

namespace zps::ZPS_TARGET {

struct AdagradScalars {
  float lr, eps, decay, sign;
};

template <bool WithDecay>
struct AdagradUpdate {
  static constexpr unsigned kStates = 0b1;
  AdagradScalars s;

  ZPS_HD void operator()(float& weight, float grad, float* state) const {
    grad *= s.sign;
    if (WithDecay) grad += s.decay * weight;
    state[0] += grad * grad;
    weight -= s.lr * grad / (sqrtf(state[0]) + s.eps);
  }
};

struct Adagrad {
  enum Hyper { kLr, kLrDecay, kWeightDecay, kEps, kMaximize, kHypers };
  static constexpr const char* kHyperNames[] = {"lr", "lr_decay", "weight_decay", "eps",
                                                "maximize"};
  static constexpr const char* kStateNames[] = {"sum"};

  template <class Visit>
  static void prepare(const double* hyper, int64_t step, double lr_factor, const Visit& visit) {
    const double lr = hyper[kLr] * lr_factor;
    const double age = static_cast<double>(step - 1);
    const AdagradScalars s = {static_cast<float>(lr / (1.0 + age * hyper[kLrDecay])),
                              static_cast<float>(hyper[kEps]),
                              static_cast<float>(hyper[kWeightDecay]),
                              hyper[kMaximize] != 0 ? -1.0f : 1.0f};
    hyper[kWeightDecay] != 0 ? visit(AdagradUpdate<true>{s}) : visit(AdagradUpdate<false>{s});
  }
};

}  // namespace zps::ZPS_TARGET
