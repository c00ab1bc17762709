"""Every mode with every way of holding a round back: nobody waits for ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zps
from tests.training.reference import gradients, new_params, values
from tests.workers import Context

LINKS = ("shm", "message")

ROUNDS = 12
MODES: dict[str, dict[str, Any]] = {
    "bsp": {},
    "quorum": {"quorum": 0.5},
    "ssp": {"mode": "ssp", "staleness": 2},
    "async": {"mode": "async"},
    "drop": {"mode": "async", "staleness_policy": "drop", "staleness": 1},
    "dc": {"mode": "ssp", "staleness": 2, "staleness_policy": "dc"},
}


def train_freely(ctx: Context, how: str, *, overlap: bool) -> Any:
    """Now and then a gradient of somebody is infinite, and a batch is empty; all end unevenly."""
    params = new_params()
    settings = {"nonfinite": "skip"} if how == "skip" else {}
    worker = ctx.worker(**settings)
    opt = zps.Optimizer(
        torch.optim.SGD(params, lr=0.01, momentum=0.5),
        max_grad_norm=5.0 if how == "clip" else None,
        overlap=overlap,
        worker=worker,
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=how == "scaler")
    for round_ in range(ROUNDS - ctx.rank):
        opt.zero_grad()
        opt.samples = 0 if round_ == 5 + ctx.rank else 1 + ctx.rank
        grads = gradients(params, ctx.rank, round_)
        if how in ("skip", "scaler") and round_ % 4 == ctx.rank:
            grads[1][0] = torch.inf
        wanted = [i for i in range(len(params)) if (i + round_) % 5]
        scaler.scale(sum((params[i] * grads[i]).sum() for i in wanted)).backward()
        scaler.step(opt)
        scaler.update()
    skipped = worker.stats()["counters"].get("rounds_skipped", 0)
    worker.close()
    return values(params), skipped


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("how", ["plain", "clip", "scaler", "skip"])
@pytest.mark.parametrize("mode", MODES)
def test_all_come_to_their_end(run, mode, how, overlap):
    results = run(train_freely, how, overlap=overlap, world=3, hub=MODES[mode])
    assert any(skipped for _, skipped in results) == (how in ("scaler", "skip"))
    for params, _ in results:
        assert all(bool(p.isfinite().all()) for p in params)
        assert not torch.equal(params[3], new_params()[3])
