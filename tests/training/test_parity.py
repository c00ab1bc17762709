"""Twenty rounds in the hub equal torch on the averaged gradient, for every rule and option."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import zps
from tests.training.reference import (
    assert_close,
    average,
    new_params,
    steps_alone,
    steps_in_hub,
    values,
)
from tests.workers import Context
from zps.training.lion import Lion

ROUNDS = 20
Groups = list[dict[str, Any]]
Kind = type[torch.optim.Optimizer]


def grid(**options: list[Any]) -> Groups:
    return [dict(zip(options, values, strict=True)) for values in product(*options.values())]


FLAGS = [False, True]
SGD = [
    options
    for options in grid(
        lr=[0.1],
        momentum=[0.0, 0.9],
        dampening=[0.0, 0.3],
        weight_decay=[0.0, 0.1],
        nesterov=FLAGS,
        maximize=FLAGS,
    )
    if not options["nesterov"] or (options["momentum"] and not options["dampening"])
]
ADAM = grid(
    lr=[0.01],
    betas=[(0.9, 0.999), (0.3, 0.6)],
    eps=[1e-8, 1e-2],
    weight_decay=[0.0, 0.1],
    amsgrad=FLAGS,
    maximize=FLAGS,
)
ADAGRAD = grid(
    lr=[0.1],
    lr_decay=[0.0, 0.1],
    weight_decay=[0.0, 0.1],
    initial_accumulator_value=[0.0, 0.5],
    eps=[1e-10, 1e-2],
    maximize=FLAGS,
)
RMSPROP = grid(
    lr=[0.01],
    alpha=[0.99, 0.4],
    eps=[1e-8, 1e-2],
    weight_decay=[0.0, 0.1],
    momentum=[0.0, 0.9],
    centered=FLAGS,
    maximize=FLAGS,
)
LION = grid(lr=[0.01], betas=[(0.9, 0.99), (0.5, 0.3)], weight_decay=[0.0, 0.1], maximize=FLAGS)
GRIDS = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: ADAM,
    torch.optim.AdamW: ADAM,
    torch.optim.Adagrad: ADAGRAD,
    torch.optim.RMSprop: RMSPROP,
    Lion: LION,
}


def named(kind: Kind) -> str:
    return kind.__name__


def in_groups(kind: Kind, groups: Groups, **options: Any) -> torch.optim.Optimizer:
    """Two small tensors a group, and a large one in the last, which spans several buckets."""
    params = new_params([*[(9, 5), (3,)] * len(groups), (41, 37)])
    members = [{**g, "params": params[2 * i : 2 * i + 2]} for i, g in enumerate(groups)]
    members[-1]["params"].append(params[-1])
    return kind(members, **options)


def train_groups(ctx: Context, kind: Kind, groups: Groups, **options: Any) -> Any:
    opt = zps.Optimizer(in_groups(kind, groups, **options), worker=ctx.worker())
    return steps_in_hub(opt, range(ROUNDS), rank=ctx.rank)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", GRIDS, ids=named)
def test_every_option_equals_torch(run, kind, world):
    """The whole grid of a rule at once: each set of options is a parameter group."""
    groups = GRIDS[kind]
    expected = steps_alone(in_groups(kind, groups), range(ROUNDS), world=world)
    for result in run(train_groups, kind, groups, world=world):
        for i, options in enumerate(groups):
            last = 1 if options is groups[-1] else 0
            part = slice(2 * i, 2 * i + 2 + last)
            assert_close(result[part], expected[part], options)


@pytest.mark.parametrize("world", [2, 3])
def test_adagrad_starts_from_its_initial_accumulator(run, world):
    options = {"lr": 0.1, "initial_accumulator_value": 0.5}
    base = in_groups(torch.optim.Adagrad, [{}], **options)
    expected = steps_alone(base, range(ROUNDS), world=world)
    for result in run(train_groups, torch.optim.Adagrad, [{}], world=world, **options):
        assert_close(result, expected)


# --- schedulers -------------------------------------------------------------------------------


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=2 * ROUNDS)


def exponential(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.ExponentialLR(optimizer, gamma=0.8)


def warm_restarts(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=6)


SCHEDULED = [
    (torch.optim.SGD, {"momentum": 0.9}, one_cycle),  # changes the momentum too
    (torch.optim.AdamW, {"lr": 1e-2}, one_cycle),  # changes the betas too
    (torch.optim.Adam, {"lr": 1e-2}, exponential),
    (torch.optim.Adagrad, {}, exponential),
    (torch.optim.RMSprop, {"centered": True}, warm_restarts),
    (Lion, {"weight_decay": 0.1}, warm_restarts),
]


def train_scheduled(ctx: Context, kind: Kind, options: Any, schedule: Any, on: str) -> Any:
    base = kind(new_params(), **options)
    early = schedule(base) if on == "the wrapped optimizer" else None
    opt = zps.Optimizer(base, worker=ctx.worker())
    result = steps_in_hub(opt, range(ROUNDS), rank=ctx.rank, scheduler=early or schedule(opt))
    return result, opt.param_groups[0]["lr"]


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
@pytest.mark.parametrize("on", ["zps.Optimizer", "the wrapped optimizer"])
@pytest.mark.parametrize(("kind", "options", "schedule"), SCHEDULED)
def test_what_a_scheduler_changes_reaches_the_hub(run, kind, options, schedule, on):
    base = kind(new_params(), **options)
    first = base.param_groups[0]["lr"]
    expected = steps_alone(base, range(ROUNDS), world=2, scheduler=schedule(base))
    for result, lr in run(train_scheduled, kind, options, schedule, on):
        assert_close(result, expected)
        assert lr == base.param_groups[0]["lr"] != first


def train_with_hyperparameters_set_by_hand(ctx: Context) -> Any:
    opt = zps.Optimizer(torch.optim.SGD(new_params(), lr=0.1), worker=ctx.worker())
    steps_in_hub(opt, range(3), rank=ctx.rank)
    opt.param_groups[0].update(lr=0.01, weight_decay=0.5, momentum=0.9)
    return steps_in_hub(opt, range(3, 6), rank=ctx.rank)


def test_hyperparameters_may_be_set_between_steps(run):
    base = torch.optim.SGD(new_params(), lr=0.1)
    steps_alone(base, range(3), world=2)
    base.param_groups[0].update(lr=0.01, weight_decay=0.5, momentum=0.9)
    expected = steps_alone(base, range(3, 6), world=2)
    for result in run(train_with_hyperparameters_set_by_hand):
        assert_close(result, expected)


# --- a model ----------------------------------------------------------------------------------

MODEL_OPTIMIZERS = {
    torch.optim.SGD: {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3},
    torch.optim.AdamW: {"lr": 1e-3},
    torch.optim.RMSprop: {"lr": 1e-3},
}


def new_model() -> torch.nn.Module:
    torch.manual_seed(5)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 3),
        torch.nn.GroupNorm(2, 6),
        torch.nn.Tanh(),
        torch.nn.Flatten(),
        torch.nn.Linear(216, 24),
        torch.nn.Tanh(),
        torch.nn.Linear(24, 5),
    )


def loss_of(model: torch.nn.Module, rank: int, round_: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * round_ + rank)
    x = torch.randn(6, 1, 8, 8, generator=generator)
    y = torch.randint(0, 5, (6,), generator=generator)
    return torch.nn.functional.cross_entropy(model(x), y)


def train_model(ctx: Context, kind: Kind) -> Any:
    torch.manual_seed(ctx.rank)
    model = new_model()
    base = kind(model.parameters(), **MODEL_OPTIMIZERS[kind])
    opt = zps.Optimizer(base, model, worker=ctx.worker())
    for round_ in range(ROUNDS):
        opt.zero_grad()
        loss_of(model, ctx.rank, round_).backward()
        opt.step()
    return values(model.parameters())


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", MODEL_OPTIMIZERS, ids=named)
def test_a_model_learns_as_in_one_process(run, kind, world):
    model = new_model()
    params = list(model.parameters())
    optimizer = kind(params, **MODEL_OPTIMIZERS[kind])
    for round_ in range(ROUNDS):
        by_rank = [
            torch.autograd.grad(loss_of(model, rank, round_), params) for rank in range(world)
        ]
        for p, grad in zip(params, average(by_rank), strict=True):
            p.grad = grad
        optimizer.step()
    for result in run(train_model, kind, world=world):
        assert_close(result, values(params))
