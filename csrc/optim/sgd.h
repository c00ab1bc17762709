// torch.optim.SGD.
#pragma once

#include "optim/target.h"

namespace zps::ZPS_TARGET {

enum class Momentum { kNone, kFirst, kRunning };

struct SgdScalars {
  float lr, momentum, gain, decay, sign;
};

template <bool WithDecay, Momentum Kind, bool WithNesterov>
struct SgdUpdate {
  static constexpr unsigned kStates = Kind == Momentum::kNone ? 0b0 : 0b1;
  SgdScalars s;

  ZPS_HD void operator()(float& weight, float grad, float* state) const {
    grad *= s.sign;
    if (WithDecay) grad += s.decay * weight;
    if (Kind == Momentum::kFirst) state[0] = grad;
    if (Kind == Momentum::kRunning) state[0] = s.momentum * state[0] + s.gain * grad;
    if (Kind != Momentum::kNone) grad = WithNesterov ? grad + s.momentum * state[0] : state[0];
    weight -= s.lr * grad;
  }
};

struct Sgd {
  enum Hyper { kLr, kMomentum, kDampening, kWeightDecay, kNesterov, kMaximize, kHypers };
  static constexpr const char* kHyperNames[] = {"lr",           "momentum", "dampening",
                                                "weight_decay", "nesterov", "maximize"};
  static constexpr const char* kStateNames[] = {"momentum_buffer"};

  /// Calls visit with the update for this step. Scalars are computed in double, as torch does.
  template <class Visit>
  static void prepare(const double* hyper, int64_t step, double lr_factor, const Visit& visit) {
    const SgdScalars s = {static_cast<float>(hyper[kLr] * lr_factor),
                          static_cast<float>(hyper[kMomentum]),
                          static_cast<float>(1.0 - hyper[kDampening]),
                          static_cast<float>(hyper[kWeightDecay]),
                          hyper[kMaximize] != 0 ? -1.0f : 1.0f};
    hyper[kWeightDecay] != 0 ? with_decay<true>(s, hyper, step, visit)
                             : with_decay<false>(s, hyper, step, visit);
  }

 private:
  template <bool WithDecay, class Visit>
  static void with_decay(const SgdScalars& s, const double* hyper, int64_t step,
                         const Visit& visit) {
    if (hyper[kMomentum] == 0) return visit(SgdUpdate<WithDecay, Momentum::kNone, false>{s});
    hyper[kNesterov] != 0 ? with_momentum<WithDecay, true>(s, step, visit)
                          : with_momentum<WithDecay, false>(s, step, visit);
  }

  template <bool WithDecay, bool WithNesterov, class Visit>
  static void with_momentum(const SgdScalars& s, int64_t step, const Visit& visit) {
    step == 1 ? visit(SgdUpdate<WithDecay, Momentum::kFirst, WithNesterov>{s})
              : visit(SgdUpdate<WithDecay, Momentum::kRunning, WithNesterov>{s});
  }
};

}  // namespace zps::ZPS_TARGET
