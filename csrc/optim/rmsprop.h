// torch.optim.RMSprop.
#pragma once

#include "optim/target.h"

namespace zps::ZPS_TARGET {

struct RmspropScalars {
  float lr, alpha, gain, eps, decay, momentum, sign;
};

template <bool WithDecay, bool Centered, bool WithMomentum>
struct RmspropUpdate {
  static constexpr unsigned kStates = 0b001 | (WithMomentum ? 0b010 : 0) | (Centered ? 0b100 : 0);
  RmspropScalars s;

  ZPS_HD void operator()(float& weight, float grad, float* state) const {
    grad *= s.sign;
    if (WithDecay) grad += s.decay * weight;
    state[0] = s.alpha * state[0] + s.gain * grad * grad;
    float average = state[0];
    if (Centered) {
      state[2] = lerp(state[2], grad, s.gain);
      average -= state[2] * state[2];
    }
    const float denominator = sqrtf(average) + s.eps;
    if (WithMomentum) {
      state[1] = s.momentum * state[1] + grad / denominator;
      weight -= s.lr * state[1];
    } else {
      weight -= s.lr * grad / denominator;
    }
  }
};

struct Rmsprop {
  enum Hyper { kLr, kAlpha, kEps, kWeightDecay, kMomentum, kCentered, kMaximize, kHypers };
  static constexpr const char* kHyperNames[] = {"lr",       "alpha",    "eps",     "weight_decay",
                                                "momentum", "centered", "maximize"};
  static constexpr const char* kStateNames[] = {"square_avg", "momentum_buffer", "grad_avg"};

  template <class Visit>
  static void prepare(const double* hyper, int64_t, double lr_factor, const Visit& visit) {
    const RmspropScalars s = {static_cast<float>(hyper[kLr] * lr_factor),
                              static_cast<float>(hyper[kAlpha]),
                              static_cast<float>(1.0 - hyper[kAlpha]),
                              static_cast<float>(hyper[kEps]),
                              static_cast<float>(hyper[kWeightDecay]),
                              static_cast<float>(hyper[kMomentum]),
                              hyper[kMaximize] != 0 ? -1.0f : 1.0f};
    hyper[kWeightDecay] != 0 ? with_decay<true>(s, hyper, visit)
                             : with_decay<false>(s, hyper, visit);
  }

 private:
  template <bool WithDecay, class Visit>
  static void with_decay(const RmspropScalars& s, const double* hyper, const Visit& visit) {
    hyper[kCentered] != 0 ? with_centered<WithDecay, true>(s, hyper, visit)
                          : with_centered<WithDecay, false>(s, hyper, visit);
  }

  template <bool WithDecay, bool Centered, class Visit>
  static void with_centered(const RmspropScalars& s, const double* hyper, const Visit& visit) {
    hyper[kMomentum] > 0 ? visit(RmspropUpdate<WithDecay, Centered, true>{s})
                         : visit(RmspropUpdate<WithDecay, Centered, false>{s});
  }
};

}  // namespace zps::ZPS_TARGET
