"""Every rule against torch.optim itself: twenty steps over the whole option grid."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from zps import native
from zps.optim.registry import rule

STEPS = 20
SHAPES = [(37, 13), (5,), (), (3, 7, 2)]


def grid(**options):
    return [dict(zip(options, values, strict=True)) for values in product(*options.values())]


SGD = [
    options
    for options in grid(
        lr=[0.1],
        momentum=[0.0, 0.9],
        dampening=[0.0, 0.3],
        weight_decay=[0.0, 0.1],
        nesterov=[False, True],
        maximize=[False, True],
    )
    if not options["nesterov"] or (options["momentum"] and not options["dampening"])
]
ADAM = grid(
    lr=[0.01],
    betas=[(0.9, 0.999), (0.3, 0.6), (0.0, 0.0)],
    eps=[1e-8, 1e-2],
    weight_decay=[0.0, 0.1],
    amsgrad=[False, True],
    maximize=[False, True],
)
ADAGRAD = grid(
    lr=[0.1],
    lr_decay=[0.0, 0.1],
    weight_decay=[0.0, 0.1],
    initial_accumulator_value=[0.0, 0.5],
    eps=[1e-10, 1e-2],
    maximize=[False, True],
)
RMSPROP = grid(
    lr=[0.01],
    alpha=[0.99, 0.4],
    eps=[1e-8, 1e-2],
    weight_decay=[0.0, 0.1],
    momentum=[0.0, 0.9],
    centered=[False, True],
    maximize=[False, True],
)
CASES = [
    *[("sgd", torch.optim.SGD, options) for options in SGD],
    *[("adam", torch.optim.Adam, options) for options in ADAM],
    *[("adam", torch.optim.Adam, {**o, "decoupled_weight_decay": True}) for o in ADAM[:8]],
    *[("adamw", torch.optim.AdamW, options) for options in ADAM],
    *[("adagrad", torch.optim.Adagrad, options) for options in ADAGRAD],
    *[("rmsprop", torch.optim.RMSprop, options) for options in RMSPROP],
]


def assert_close(mine, theirs):
    """Within 1e-6 of the largest value of all tensors: a lone weight may pass through zero."""
    ours = torch.cat([torch.as_tensor(array) for array in mine])
    reference = torch.cat([tensor.detach().reshape(-1) for tensor in theirs])
    assert (ours - reference).abs().max() <= 1e-6 * reference.abs().max()


class Native:
    """The parameters of SHAPES in one bucket, each in a group of its own."""

    def __init__(self, name, options, params):
        chosen = rule(name)
        used = chosen.state_used(options)
        self.starts = np.cumsum([0] + [(p.numel() + 31) // 32 * 32 for p in params])
        n = int(self.starts[-1])
        self.weights, self.slot = np.zeros(n, np.float32), np.zeros(n, np.float32)
        self.params = params
        for i, p in enumerate(params):
            self.view(self.weights, i)[:] = p.detach().reshape(-1).numpy()
        initial = chosen.initial(options)
        self.states = {s: np.full(n, initial[s], np.float32) for s in used}
        segments = [(self.starts[i], p.numel(), i, i) for i, p in enumerate(params)]
        self.job = native.Job(
            rule=chosen.kernel,
            segments=np.array(segments, native.SEGMENT),
            grad_dtype=native.DTYPE["float32"],
            weights_ptr=self.weights.ctypes.data,
            master_ptr=self.weights.ctypes.data,
            state_ptrs=[self.states[s].ctypes.data if s in used else 0 for s in chosen.states],
        )
        self.job.slots = [self.slot.ctypes.data]
        self.job.hypers = chosen.pack([options] * len(params))
        self.pool = native.Pool(1)

    def view(self, flat, i):
        return flat[self.starts[i] : self.starts[i] + self.params[i].numel()]

    def all(self, flat):
        return [self.view(flat, i) for i in range(len(self.params))]

    def step(self, number, grads):
        for i, grad in enumerate(grads):
            self.view(self.slot, i)[:] = grad.reshape(-1).numpy()
        self.job.steps = np.full(len(grads), number, np.int64)
        native.apply(self.pool, [self.job])


@pytest.mark.parametrize(("name", "torch_class", "options"), CASES)
def test_twenty_steps_equal_torch(name, torch_class, options):
    generator = torch.Generator().manual_seed(1)
    params = [torch.randn(s, generator=generator).requires_grad_() for s in SHAPES]
    mine = Native(name, options, params)
    theirs = torch_class(params, **options, foreach=False)
    for number in range(1, STEPS + 1):
        grads = [torch.randn(s, generator=generator) for s in SHAPES]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        theirs.step()
        mine.step(number, grads)
    assert_close(mine.all(mine.weights), params)
    exist = {name for name, value in theirs.state[params[0]].items() if value is not None}
    assert exist - {"step"} == set(mine.states)
    for name, state in mine.states.items():
        assert_close(mine.all(state), [theirs.state[p][name] for p in params])


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_twenty_steps_of_lion_follow_the_paper(weight_decay, maximize):
    lr, beta1, beta2 = 0.01, 0.9, 0.99
    generator = torch.Generator().manual_seed(1)
    params = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
    moments = [torch.zeros_like(p) for p in params]
    options = {"weight_decay": weight_decay, "maximize": maximize, "lr": lr}
    mine = Native("lion", {**options, "betas": (beta1, beta2)}, [p.float() for p in params])
    for number in range(1, STEPS + 1):
        grads = [torch.randn(s, generator=generator) for s in SHAPES]
        for w, m, grad in zip(params, moments, grads, strict=True):
            g = -grad.double() if maximize else grad.double()
            w -= lr * ((beta1 * m + (1 - beta1) * g).sign() + weight_decay * w)
            m.mul_(beta2).add_(g, alpha=1 - beta2)
        mine.step(number, grads)
    assert_close(mine.all(mine.weights), params)
    assert_close(mine.all(mine.states["exp_avg"]), moments)
