"""In bsp the result depends neither on who comes first nor on when gradients leave: bit for bit."""

from __future__ import annotations

import threading
from itertools import permutations
from typing import Any

import pytest
import torch

import zps
from tests.training.reference import (
    assert_close,
    assert_same_bits,
    gradients,
    new_params,
    train,
    values,
)
from tests.workers import Context

Order = tuple[int, ...]
ROUNDS = 6


def push_in_order(ctx: Context, orders: list[Order]) -> list[torch.Tensor]:
    """Rounds in which the hub has each rank's gradients before the next rank sends its own."""
    params = new_params()
    worker = ctx.worker()
    opt = zps.Optimizer(torch.optim.AdamW(params, lr=0.01), worker=worker)
    for round_, order in enumerate(orders):
        opt.zero_grad()
        at = order.index(ctx.rank)
        if at > 0:
            ctx.hear(order[at - 1])
        grads = gradients(params, ctx.rank, round_)
        sum((p * grad).sum() for p, grad in zip(params, grads, strict=True)).backward()
        step = threading.Thread(target=opt.step)
        step.start()
        if at + 1 < ctx.world:
            while worker.stats()["waiting_for"] != sorted(order[at + 1 :]):
                pass  # until the hub has what this rank pushed
            ctx.tell(order[at + 1])
        step.join()
    return values(params)


def test_the_order_of_arrival_changes_no_bit(run):
    orders = list(permutations(range(3)))
    forward = run(push_in_order, [orders[0]] * ROUNDS, world=3)
    for other in ([orders[-1]] * ROUNDS, orders, orders[::-1]):
        for mine, theirs in zip(run(push_in_order, other, world=3), forward, strict=True):
            assert_same_bits(mine, theirs)


def test_a_run_repeated_gives_the_same_bits(run):
    orders = [(0, 1), (1, 0)] * 3
    first, second = run(push_in_order, orders), run(push_in_order, orders)
    assert_same_bits(first[0], second[0])
    assert_same_bits(first[1], second[1])
    assert_same_bits(first[0], first[1])


def new_model() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(20, 70), torch.nn.Tanh(), torch.nn.Linear(70, 40), torch.nn.Linear(40, 1)
    )


def train_model(
    ctx: Context, *, overlap: bool, max_grad_norm: float | None = None
) -> list[torch.Tensor]:
    model = new_model()
    opt = zps.Optimizer(
        torch.optim.Adam(model.parameters(), lr=0.01),
        model,
        overlap=overlap,
        max_grad_norm=max_grad_norm,
        worker=ctx.worker(),
    )
    assert len(opt._worker.layout.buckets) > 3
    generator = torch.Generator().manual_seed(ctx.rank)
    for _ in range(ROUNDS):
        opt.zero_grad()
        model(torch.randn(8, 20, generator=generator)).square().mean().backward()
        opt.step()
    return values(model.parameters())


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
def test_overlap_changes_no_bit(run, max_grad_norm):
    early = run(train_model, overlap=True, max_grad_norm=max_grad_norm)
    late = run(train_model, overlap=False, max_grad_norm=max_grad_norm)
    for mine, theirs in zip(early, late, strict=True):
        assert_same_bits(mine, theirs)


def adamw(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01)


@pytest.mark.parametrize("overlap", [True, False])
def test_copying_weights_instead_of_sharing_them_changes_no_bit(run, overlap):
    shared = run(train, adamw, ROUNDS, overlap=overlap)
    copied = run(train, adamw, ROUNDS, settings={"pull": "copy"}, overlap=overlap)
    for mine, theirs in zip(copied, shared, strict=True):
        assert_same_bits(mine, theirs)


@pytest.mark.parametrize("hub", [{"hub_threads": 1}, {"bucket_bytes": 64 * 2**10}])
def test_neither_threads_nor_the_size_of_buckets_change_a_bit(run, hub):
    usual = run(train, adamw, ROUNDS)
    for mine, theirs in zip(run(train, adamw, ROUNDS, hub=hub), usual, strict=True):
        assert_same_bits(mine, theirs)


def look_before_the_step(ctx: Context, *, overlap: bool) -> None:
    model = new_model()
    worker = ctx.worker()
    opt = zps.Optimizer(
        torch.optim.SGD(model.parameters(), lr=0.01), model, overlap=overlap, worker=worker
    )
    for _ in range(3):
        opt.zero_grad()
        model(torch.ones(1, 20)).sum().backward()
        weights = values(model.parameters())
        copied = [
            torch.equal(worker.slot(name), param.grad) for name, param in model.named_parameters()
        ]
        assert all(copied) == overlap
        worker.stats()  # whatever was sent before has been carried out by now
        assert_same_bits(values(model.parameters()), weights)
        opt.step()
        assert not torch.equal(next(model.parameters()), weights[0])


@pytest.mark.parametrize("overlap", [True, False])
def test_gradients_are_copied_during_backward_and_applied_at_the_step(run, overlap):
    run(look_before_the_step, overlap=overlap, world=1)


class Detached(torch.autograd.Function):
    """A product whose backward reads the weight when its gradient has long been accumulated."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.weight, None


def read_weights_late(ctx: Context) -> list[torch.Tensor]:
    opt_params = [torch.nn.Parameter(torch.full((4,), 2.0)), torch.nn.Parameter(torch.ones(4))]
    late, early = opt_params
    opt = zps.Optimizer(torch.optim.SGD(opt_params, lr=0.5), worker=ctx.worker())
    for _ in range(3):
        opt.zero_grad()
        # `early` is done first in backward; then its value is read, detached, on the way to `late`.
        (Detached.apply(late, early.detach()) * early).sum().backward()
        opt.step()
    return values(opt_params)


def test_backward_may_read_a_weight_whose_gradient_is_ready(run):
    params = [torch.full((4,), 2.0), torch.ones(4)]
    for _ in range(3):
        late, early = params
        params = [late - 0.5 * early * early, early - 0.5 * late * early]
    for result in run(read_weights_late):
        assert_close(result, params)
