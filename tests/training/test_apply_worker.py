"""apply="worker": the hub averages gradients, and every worker takes the same step itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import zps
from tests.training.reference import (
    assert_close,
    assert_same_bits,
    new_params,
    steps_alone,
    steps_in_hub,
    values,
)
from tests.workers import Context
from zps.errors import ConfigError


class Unknown(torch.optim.SGD):
    """The hub need not know the class."""


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:], "lr": 0.3}], lr=0.01)


def unknown(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return Unknown(params, lr=0.1, momentum=0.9)


def average_and_step(ctx: Context, make: Any, settings: dict[str, Any], *, overlap: bool) -> Any:
    generator = torch.Generator().manual_seed(ctx.rank)
    params = new_params()
    if ctx.rank:  # rank 0's weights become everyone's
        with torch.no_grad():
            for p in params:
                p.normal_(generator=generator)
    base = make(params)
    opt = zps.Optimizer(base, apply="worker", overlap=overlap, worker=ctx.worker(**settings))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    result = steps_in_hub(opt, range(5), rank=ctx.rank, scheduler=scheduler)
    state = opt.state_dict()
    assert state["state"].keys() == base.state_dict()["state"].keys()
    opt.load_state_dict(state)
    return result, steps_in_hub(opt, range(5, 8), rank=ctx.rank, scheduler=scheduler)


@pytest.mark.parametrize("settings", [{}, {"pull": "copy"}], ids=["alias", "copy"])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("make", [adamw, unknown])
def test_every_worker_steps_on_the_averaged_gradient(run, make, overlap, settings):
    base = make(new_params())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(base, 0.9)
    before = steps_alone(base, range(5), world=2, scheduler=scheduler)
    after = steps_alone(base, range(5, 8), world=2, scheduler=scheduler)
    results = run(average_and_step, make, settings, overlap=overlap)
    for first, last in results:
        assert_close(first, before)
        assert_close(last, after)
    assert_same_bits(results[0][1], results[1][1])


def write_weights_freely(ctx: Context) -> list[torch.Tensor]:
    """The weights are the worker's own: it may write them, and publish rank 0's."""
    params = new_params()
    opt = zps.Optimizer(torch.optim.SGD(params, lr=0.1), apply="worker", worker=ctx.worker())
    steps_in_hub(opt, range(2), rank=ctx.rank)
    with torch.no_grad():
        for p, fresh in zip(params, new_params(), strict=True):
            p.copy_(fresh + ctx.rank)
    opt.publish()
    assert_same_bits(values(params), values(new_params()))
    return steps_in_hub(opt, range(2, 4), rank=ctx.rank)


def test_publish_makes_rank_0s_weights_everyones(run):
    expected = steps_alone(torch.optim.SGD(new_params(), lr=0.1), range(2, 4), world=2)
    for result in run(write_weights_freely):
        assert_close(result, expected)


def step_out_of_step(ctx: Context) -> None:
    with pytest.raises(ConfigError, match="mode='bsp' and quorum=1"):
        zps.Optimizer(adamw(new_params()), apply="worker", worker=ctx.worker())


@pytest.mark.parametrize("hub", [{"mode": "ssp"}, {"mode": "async"}, {"quorum": 0.5}])
def test_workers_that_are_not_in_step_cannot_each_take_it(run, hub):
    run(step_out_of_step, world=1, hub=hub)
