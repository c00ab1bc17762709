// torch.optim.Adam and AdamW, with and without amsgrad.
#pragma once

#include "optim/target.h"

namespace zps::ZPS_TARGET {

struct AdamScalars {
  float step_size, scale2, eps, lerp1, beta2, lerp2, l2, shrink, sign;
};

template <bool WithL2, bool WithAmsgrad>
struct AdamUpdate {
  static constexpr unsigned kStates = WithAmsgrad ? 0b111 : 0b011;
  AdamScalars s;

  ZPS_HD void operator()(float& weight, float grad, float* state) const {
    grad *= s.sign;
    weight *= s.shrink;
    if (WithL2) grad += s.l2 * weight;
    state[0] = lerp(state[0], grad, s.lerp1);
    state[1] = s.beta2 * state[1] + s.lerp2 * grad * grad;
    float second = state[1];
    if (WithAmsgrad) {
      // A NaN on either side wins, as in torch.maximum.
      state[2] = (second > state[2]) | (second != second) ? second : state[2];
      second = state[2];
    }
    const float denominator = sqrtf(second) * s.scale2 + s.eps;
    weight -= s.step_size * state[0] / denominator;
  }
};

struct Adam {
  enum Hyper { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kAmsgrad, kMaximize, kDecoupled, kHypers };
  static constexpr const char* kHyperNames[] = {
      "lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize",
      "decoupled_weight_decay"};
  static constexpr const char* kStateNames[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};

  template <class Visit>
  static void prepare(const double* hyper, int64_t step, double lr_factor, const Visit& visit) {
    const double lr = hyper[kLr] * lr_factor;
    const bool decoupled = hyper[kDecoupled] != 0;
    const double correction1 = 1.0 - pow(hyper[kBeta1], static_cast<double>(step));
    const double correction2 = 1.0 - pow(hyper[kBeta2], static_cast<double>(step));
    const AdamScalars s = {static_cast<float>(lr / correction1),
                           static_cast<float>(1.0 / sqrt(correction2)),
                           static_cast<float>(hyper[kEps]),
                           static_cast<float>(1.0 - hyper[kBeta1]),
                           static_cast<float>(hyper[kBeta2]),
                           static_cast<float>(1.0 - hyper[kBeta2]),
                           static_cast<float>(hyper[kWeightDecay]),
                           decoupled ? static_cast<float>(1.0 - lr * hyper[kWeightDecay]) : 1.0f,
                           hyper[kMaximize] != 0 ? -1.0f : 1.0f};
    const bool l2 = hyper[kWeightDecay] != 0 && !decoupled;
    hyper[kAmsgrad] != 0 ? with_amsgrad<true>(s, l2, visit) : with_amsgrad<false>(s, l2, visit);
  }

 private:
  template <bool WithAmsgrad, class Visit>
  static void with_amsgrad(const AdamScalars& s, bool l2, const Visit& visit) {
    l2 ? visit(AdamUpdate<true, WithAmsgrad>{s}) : visit(AdamUpdate<false, WithAmsgrad>{s});
  }
};

}  // namespace zps::ZPS_TARGET
