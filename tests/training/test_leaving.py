"""The model, the optimizer and the other workers after one has left."""

from __future__ import annotations

import os
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
from zps.errors import Closed, ConfigError


def new_model() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 50), nn.Linear(50, 30), nn.Linear(30, 2))


def train_model(model: nn.Module, opt: torch.optim.Optimizer, rounds: int) -> None:
    for round_ in range(rounds):
        opt.zero_grad()
        model(torch.full((2, 4), round_ + 1.0)).square().sum().backward()
        opt.step()


def leave_early(ctx: Context, *, overlap: bool) -> Any:
    model = new_model()
    base = torch.optim.SGD(model.parameters(), lr=1e-3)
    worker = ctx.worker()
    opt = zps.Optimizer(base, model, overlap=overlap, worker=worker)
    train_model(model, opt, 3)
    last = values(model.parameters())
    if ctx.rank == 0:
        worker.close()
        ctx.meet()
        ctx.meet()  # rank 1 has trained on, alone
        return last, values(model.parameters())
    ctx.meet()
    train_model(model, opt, 3)
    ctx.meet()
    return last, values(model.parameters())


@pytest.mark.parametrize("overlap", [True, False])
def test_a_model_keeps_its_weights_while_others_train_on(run, overlap):
    (left, kept), (last, trained) = run(leave_early, overlap=overlap)
    assert_same_bits(left, last)
    assert_same_bits(kept, left)
    assert not torch.equal(trained[0], last[0])


def go_on_alone(ctx: Context) -> Any:
    model = new_model()
    worker = ctx.worker()
    opt = zps.Optimizer(torch.optim.SGD(model.parameters(), lr=1e-3), model, worker=worker)
    train_model(model, opt, 3)
    last = values(model.parameters())
    worker.close()
    ctx.meet()
    for call in (opt.step, opt.publish, opt.state_dict):
        with pytest.raises(Closed, match=f"rank {ctx.rank}"):
            call()
    plain = torch.optim.SGD(model.parameters(), lr=1e-3 * (1 + ctx.rank))
    train_model(model, plain, 3)  # the hooks of the job are no hindrance
    ctx.meet()
    return last, values(model.parameters())


def test_models_go_on_in_plain_torch_and_apart_from_one_another(run):
    for rank, (last, trained) in enumerate(run(go_on_alone)):
        model = new_model()
        with torch.no_grad():
            for p, value in zip(model.parameters(), last, strict=True):
                p.copy_(value)
        plain = torch.optim.SGD(model.parameters(), lr=1e-3 * (1 + rank))
        train_model(model, plain, 3)
        assert_close(trained, values(model.parameters()))


def train_in_two_jobs(ctx: Context) -> list[torch.Tensor]:
    model = new_model()
    for lr in (1e-3, 1e-4):
        worker = ctx.worker()
        base = torch.optim.SGD(model.parameters(), lr=lr)
        train_model(model, zps.Optimizer(base, model, worker=worker), 3)
        worker.close()
        ctx.meet()
    return values(model.parameters())


def test_a_model_may_be_trained_in_one_job_after_another(run):
    model = new_model()
    for lr in (1e-3, 1e-4):
        train_model(model, torch.optim.SGD(model.parameters(), lr=lr), 3)
    for result in run(train_in_two_jobs):
        assert_close(result, values(model.parameters()))


def end_uneven_epochs(ctx: Context, *, overlap: bool) -> int:
    """Rank r has 3 + 2 r batches; nobody tells anybody."""
    params = new_params()
    base = torch.optim.SGD(params, lr=0.1)
    worker = ctx.worker()
    opt = zps.Optimizer(base, overlap=overlap, worker=worker)
    rounds = 3 + 2 * ctx.rank
    steps_in_hub(opt, range(rounds), rank=ctx.rank)
    worker.close()
    return rounds


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("mode", ["bsp", "ssp", "async"])
def test_a_worker_that_ends_early_blocks_nobody(run, mode, overlap):
    assert run(end_uneven_epochs, overlap=overlap, world=3, hub={"mode": mode}) == [3, 5, 7]


def finish_with_fewer(ctx: Context) -> list[torch.Tensor]:
    params = new_params()
    worker = ctx.worker()
    opt = zps.Optimizer(torch.optim.SGD(params, lr=0.1), worker=worker)
    steps_in_hub(opt, range(2 if ctx.rank else 4), rank=ctx.rank)
    worker.close()
    return values(params)


def test_the_mean_is_over_those_who_are_left(run):
    expected = torch.optim.SGD(new_params(), lr=0.1)
    steps_alone(expected, range(2), world=2)
    after = steps_alone(expected, range(2, 4), world=1)
    result, _ = run(finish_with_fewer)
    assert_close(result, after)


# --- the job of a process ---------------------------------------------------------------------


def use_the_process_own_worker(ctx: Context) -> Any:
    assert not zps.is_initialized()
    for call in (zps.rank, zps.world_size, zps.barrier, zps.stats):
        with pytest.raises(Closed, match="zps.init"):
            call()
    with pytest.raises(Closed, match="zps.init"):
        zps.Optimizer(torch.optim.SGD(new_params(), lr=0.1))
    zps.init(ctx.hub, rank=ctx.rank, world_size=ctx.world)
    try:
        facts = (zps.is_initialized(), zps.rank(), zps.world_size())
        with pytest.raises(ConfigError, match="twice"):
            zps.init(ctx.hub, rank=ctx.rank, world_size=ctx.world)
        opt = zps.Optimizer(torch.optim.SGD(new_params(), lr=0.1))
        result = steps_in_hub(opt, range(2), rank=ctx.rank)
        zps.barrier()
        live = zps.stats()["live"]
        zps.barrier()
    finally:
        zps.shutdown()
        zps.shutdown()
    with pytest.raises(Closed):
        opt.step()
    assert not zps.is_initialized()
    return facts, live, result


def test_init_makes_the_worker_that_is_used_without_being_named(run):
    expected = steps_alone(torch.optim.SGD(new_params(), lr=0.1), range(2), world=2)
    for rank, (facts, live, result) in enumerate(run(use_the_process_own_worker)):
        assert facts == (True, rank, 2)
        assert live == [0, 1]
        assert_close(result, expected)


def start_a_hub(ctx: Context) -> Any:
    """Without a hub anywhere, init starts one for this process alone."""
    zps.init()
    opt = zps.Optimizer(torch.optim.SGD(new_params(), lr=0.1))
    hub = opt._worker._session.welcome.pid
    result = steps_in_hub(opt, range(2), rank=0)
    zps.shutdown()
    with pytest.raises(ProcessLookupError):
        os.kill(hub, 0)
    return result


def test_init_without_a_hub_starts_one_that_ends_with_shutdown(run):
    (result,) = run(start_a_hub, world=1)
    assert_close(result, steps_alone(torch.optim.SGD(new_params(), lr=0.1), range(2), world=1))
