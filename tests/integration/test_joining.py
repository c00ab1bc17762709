"""A worker that leaves and comes back: it finds the job as it is, and takes part from there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zps
from tests.workers import Context
from zps.errors import UnsupportedError

LINKS = ("shm", "message", "tcp")

ROUNDS = 3


def make(ctx: Context, seed: int, **options: Any) -> tuple[torch.nn.Linear, zps.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Linear(6, 3)
    inner = torch.optim.Adam(model.parameters(), lr=0.05)
    return model, zps.Optimizer(inner, model, worker=ctx.worker(), **options)


def train(model: torch.nn.Linear, opt: zps.Optimizer, rank: int) -> None:
    for number in range(ROUNDS):
        opt.zero_grad()
        inputs = torch.full((2, 6), 0.5 + rank + number)
        model(inputs).square().mean().backward()
        opt.step()


def leave_and_come_back(ctx: Context) -> list[torch.Tensor]:
    model, opt = make(ctx, seed=0)
    train(model, opt, ctx.rank)
    if ctx.rank == 0:
        ctx.hear(1)
        train(model, opt, 0)  # alone
        ctx.tell(1, model.weight.detach().clone())
        ctx.hear(1)
    else:
        opt._worker.close()
        ctx.tell(0, "gone")
        now = ctx.hear(0)
        model, opt = make(ctx, seed=99)
        assert torch.equal(model.weight, now)
        assert int(opt.state_dict()["state"][0]["step"]) == 2 * ROUNDS
        ctx.tell(0, "back")
    train(model, opt, ctx.rank)
    ctx.meet()
    return [p.detach().clone() for p in model.parameters()]


def test_a_worker_that_comes_back_takes_the_job_as_it_is(run: Any) -> None:
    first, second = run(leave_and_come_back, world=2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def come_back_to_steps_of_workers(ctx: Context) -> None:
    model, opt = make(ctx, seed=0, apply="worker")
    train(model, opt, ctx.rank)
    if ctx.rank == 1:
        opt._worker.close()
        with pytest.raises(UnsupportedError, match="cannot join a running job"):
            make(ctx, seed=0, apply="worker")
    ctx.meet()


def test_nobody_joins_a_job_whose_weights_are_with_its_workers(run: Any) -> None:
    run(come_back_to_steps_of_workers, world=2)


def come_back_as_rank_0(ctx: Context) -> None:
    tensors = {"a": torch.zeros(900), "b": torch.zeros(900)}
    worker = ctx.worker()
    worker.declare(tensors, "add", extras={"x": torch.full((3,), 5.0)})
    if ctx.rank == 0:
        worker.close()
        worker = ctx.worker()
        own = {name: tensor + 9 for name, tensor in tensors.items()}
        worker.declare(own, "add", extras={"x": torch.full((3,), 9.0)})
    ctx.meet()
    assert torch.equal(worker.extra("x"), torch.full((3,), 5.0))
    assert torch.equal(worker.weights("a"), tensors["a"])
    ctx.meet()


@pytest.mark.parametrize("hubs", [1, 2])
def test_a_newcomers_values_count_for_nothing_even_as_rank_0(run: Any, hubs: int) -> None:
    run(come_back_as_rank_0, hubs=hubs)


def train_by_other_hypers(ctx: Context) -> list[float]:
    """Rank 0, by whose hyperparameters rounds go, has no momentum; rank 1 has."""
    worker = ctx.worker()
    momentum = {"momentum": 0.5} if ctx.rank else {}
    worker.declare({"w": torch.zeros(1)}, "sgd", lr=1.0, **momentum)
    worker.push({"w": torch.ones(1)}).wait()
    ctx.meet()
    if ctx.rank == 0:
        worker.close()
        ctx.tell(1)
        return []
    ctx.hear(0)
    seen = []
    for _ in range(3):
        worker.push({"w": torch.ones(1)}).wait()
        worker.pull()
        seen.append(worker.weights("w").item())
    return seen


def test_state_is_there_for_whoever_is_left(run: Any) -> None:
    assert run(train_by_other_hypers)[1] == [-2.0, -3.5, -5.25]
