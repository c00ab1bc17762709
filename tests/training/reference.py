"""What training in workers is compared with: torch in one process, on the averaged gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import zps
from tests.workers import Context

Tensors = Sequence[torch.Tensor]
MakeOptimizer = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

#: Several buckets of 4096 bytes: small tensors together, one cut into pieces, one without elements.
SHAPES = [(9, 5), (3,), (), (41, 37), (2, 3, 4), (0, 3)]


def new_params(shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[torch.nn.Parameter]:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(params: Tensors, rank: int, round_: int) -> list[torch.Tensor]:
    """The gradients of one rank in one round, drawn without looking at the weights."""
    generator = torch.Generator().manual_seed(1000 * round_ + rank)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]


def average(by_rank: Sequence[Tensors]) -> list[torch.Tensor]:
    """Each parameter's mean gradient, added in rank order."""
    return [sum(grads[1:], grads[0]) / len(grads) for grads in zip(*by_rank, strict=True)]


def set_gradients(params: Sequence[torch.nn.Parameter], grads: Tensors) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.clone()


def values(params: Tensors) -> list[torch.Tensor]:
    """What the parameters hold now."""
    return [p.detach().clone() for p in params]


def steps_alone(
    optimizer: torch.optim.Optimizer, rounds: range, *, world: int, scheduler: Any = None
) -> list[torch.Tensor]:
    """Steps of a plain optimizer on the mean of every rank's gradients."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for round_ in rounds:
        set_gradients(params, average([gradients(params, r, round_) for r in range(world)]))
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return values(params)


def steps_in_hub(
    opt: zps.Optimizer, rounds: range, *, rank: int, scheduler: Any = None
) -> list[torch.Tensor]:
    """The same steps as one of the workers."""
    params = [p for group in opt.param_groups for p in group["params"]]
    for round_ in rounds:
        set_gradients(params, gradients(params, rank, round_))
        opt.step()
        if scheduler is not None:
            scheduler.step()
    return values(params)


def train(
    ctx: Context,
    make: MakeOptimizer,
    rounds: int,
    *,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> list[torch.Tensor]:
    """A worker's whole run over `new_params()`; returns its weights."""
    opt = zps.Optimizer(make(new_params()), worker=ctx.worker(**(settings or {})), **options)
    return steps_in_hub(opt, range(rounds), rank=ctx.rank)


def assert_close(mine: Tensors, theirs: Tensors, what: object = "", *, floor: float = 0.0) -> None:
    """Every tensor within 1e-6 of the other, relative to its largest element.

    floor  of that largest element: for states, in which gradients of order 1 may cancel
    """
    assert len(mine) == len(theirs)
    for index, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert a.shape == b.shape, (what, index)
        if a.numel():
            error = (a.double() - b.double()).abs().max().item()
            limit = 1e-6 * max(floor, b.double().abs().max().item())
            assert error <= limit, f"{what} tensor {index}: off by {error:.3g}, over {limit:.3g}"


def assert_same_bits(mine: Tensors, theirs: Tensors, what: object = "") -> None:
    assert len(mine) == len(theirs)
    for index, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert a.dtype == b.dtype, (what, index)
        a, b = (t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (a, b))
        assert torch.equal(a, b), (what, index)
