"""zps.Lion by itself, as any torch optimizer."""

from __future__ import annotations

import pytest
import torch

import zps
from tests.training.reference import assert_close, gradients, new_params, set_gradients


@pytest.mark.parametrize("maximize", [False, True])
def test_twenty_steps_follow_the_paper(maximize):
    lr, (beta1, beta2), decay = 0.01, (0.9, 0.99), 0.1
    params = new_params()
    weights = [p.detach().double() for p in params]
    moments = [torch.zeros_like(w) for w in weights]
    lion = zps.Lion(params, lr=lr, betas=(beta1, beta2), weight_decay=decay, maximize=maximize)
    for round_ in range(20):
        grads = gradients(params, 0, round_)
        set_gradients(params, grads)
        for w, m, grad in zip(weights, moments, grads, strict=True):
            g = grad.double() * (-1 if maximize else 1)
            w -= lr * ((beta1 * m + (1 - beta1) * g).sign() + decay * w)
            m.mul_(beta2).add_(g, alpha=1 - beta2)
        lion.step()
    assert_close(params, weights)
    assert_close([lion.state[p]["exp_avg"] for p in params], moments, floor=1.0)


def test_a_parameter_without_gradient_is_left_alone_and_a_closure_called():
    params = new_params()
    before = [p.detach().clone() for p in params]
    params[0].grad = torch.ones_like(params[0])
    assert zps.Lion(params, weight_decay=0.5).step(lambda: 3.0) == 3.0
    assert not torch.equal(params[0], before[0])
    assert all(torch.equal(p, b) for p, b in zip(params[1:], before[1:], strict=True))


@pytest.mark.parametrize(
    "options", [{"lr": -1.0}, {"weight_decay": -0.1}, {"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.5)}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="out of range"):
        zps.Lion(new_params(), **options)
