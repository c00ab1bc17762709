"""Rounds that go by without the event loop come to the same as those that do not."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import zps
from tests.workers import Context

WORLD = 3
STEPS = 120
SIZES = {"a": 3, "b": 5000, "c": 1500}  # "b" and "c" take several buckets

Found = tuple[list[bytes], dict[str, int]]


def anything(ctx: Context, seed: int, link: str, rule: str) -> Found:
    """What all ranks do alike is drawn from `seed`, what each does by itself from its own."""
    worker = ctx.worker(link=link)
    worker.declare({name: torch.zeros(size) for name, size in SIZES.items()}, rule, **HYPERS[rule])
    together, own = random.Random(seed), random.Random(f"{seed} {ctx.rank}")
    found = []
    for _ in range(STEPS):
        what = together.choice(["again"] * 8 + ["weights", "nothing", "part", "ask", "meet", "new"])
        samples = 1.0
        if what == "weights":
            samples = own.choice([0.5, 2.0, 16.0])
        elif what == "nothing":
            samples = own.choice([0.0, 1.0])
        gradient = {name: torch.full((n,), own.random() - 0.5) for name, n in SIZES.items()}
        names = together.sample(sorted(SIZES), len(SIZES))
        cut = 2 if what == "part" else 0
        works = [
            worker.push({name: gradient[name] for name in part}, samples=samples)
            for part in (names[:cut], names[cut:])
            if part
        ]
        if what == "ask":
            worker.stats()
        for work in works:
            work.wait()
        if what == "meet":
            worker.barrier()
        if what == "new":
            worker.publish({name: torch.full((n,), 0.25) for name, n in SIZES.items()})
        found.append(b"".join(worker.weights(name).numpy().tobytes() for name in SIZES))
    ctx.meet()
    counters = worker.stats()["counters"]
    ctx.meet()
    return found, counters


HYPERS: dict[str, dict[str, Any]] = {"add": {}, "adam": {"lr": 0.01}, "sgd": {"lr": 0.1}}


@pytest.mark.parametrize("rule", HYPERS)
@pytest.mark.parametrize("seed", range(2))
def test_any_mixture_comes_to_the_same_bits(run: Any, rule: str, seed: int) -> None:
    express = run(anything, seed, "shm", rule, world=WORLD)
    ordinary = run(anything, seed, "message", rule, world=WORLD)
    for (weights, counters), (expected, others) in zip(express, ordinary, strict=True):
        assert weights == expected
        assert counters["express_rounds"] > STEPS / 10
        assert "express_rounds" not in others
        assert counters["updates"] == others["updates"]


def train(ctx: Context, scheduled: bool) -> tuple[dict[str, Any], int]:
    """An optimizer, whose learning rate changes every step, or every tenth."""
    zps.init(hub=ctx.hub, rank=ctx.rank, world_size=ctx.world, timeout_s=30)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 1))
    opt = zps.Optimizer(torch.optim.AdamW(model.parameters(), lr=0.01), model)
    every = 1 if scheduled else 10
    scheduler = torch.optim.lr_scheduler.StepLR(opt, every, 0.9)
    data = torch.Generator().manual_seed(ctx.rank)
    for _ in range(40):
        opt.zero_grad()
        model(torch.randn(8, 20, generator=data)).square().mean().backward()
        opt.step()
        scheduler.step()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    express = opt._worker.stats()["counters"].get("express_rounds", 0)
    ctx.meet()
    zps.shutdown()
    return state, express


def alone(scheduled: bool) -> dict[str, Any]:
    """The same in one process, on all batches."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 1))
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1 if scheduled else 10, 0.9)
    data = [torch.Generator().manual_seed(rank) for rank in range(2)]
    for _ in range(40):
        opt.zero_grad()
        batch = torch.cat([torch.randn(8, 20, generator=source) for source in data])
        model(batch).square().mean().backward()
        opt.step()
        scheduler.step()
    return dict(model.state_dict())


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_schedule_reaches_express_rounds(run: Any, scheduled: bool) -> None:
    expected = alone(scheduled)
    for state, express in run(train, scheduled):
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-7)
        assert scheduled or express > 20
