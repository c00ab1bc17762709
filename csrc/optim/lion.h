// Lion. Source: Chen et al., Symbolic Discovery of Optimization Algorithms (2023), algorithm 2.
#pragma once

#include "optim/target.h"

namespace zps::ZPS_TARGET {

struct LionScalars {
  float lr, shrink, beta1, gain1, beta2, gain2, sign;
};

struct LionUpdate {
  static constexpr unsigned kStates = 0b1;
  LionScalars s;

  ZPS_HD void operator()(float& weight, float grad, float* state) const {
    grad *= s.sign;
    const float blend = s.beta1 * state[0] + s.gain1 * grad;
    const float direction = (blend > 0.0f ? 1.0f : 0.0f) - (blend < 0.0f ? 1.0f : 0.0f);
    weight = weight * s.shrink - s.lr * direction;
    state[0] = s.beta2 * state[0] + s.gain2 * grad;
  }
};

struct Lion {
  enum Hyper { kLr, kBeta1, kBeta2, kWeightDecay, kMaximize, kHypers };
  static constexpr const char* kHyperNames[] = {"lr", "beta1", "beta2", "weight_decay",
                                                "maximize"};
  static constexpr const char* kStateNames[] = {"exp_avg"};

  template <class Visit>
  static void prepare(const double* hyper, int64_t, double lr_factor, const Visit& visit) {
    const double lr = hyper[kLr] * lr_factor;
    visit(LionUpdate{{static_cast<float>(lr), static_cast<float>(1.0 - lr * hyper[kWeightDecay]),
                      static_cast<float>(hyper[kBeta1]), static_cast<float>(1.0 - hyper[kBeta1]),
                      static_cast<float>(hyper[kBeta2]), static_cast<float>(1.0 - hyper[kBeta2]),
                      hyper[kMaximize] != 0 ? -1.0f : 1.0f}});
  }
};

}  // namespace zps::ZPS_TARGET
