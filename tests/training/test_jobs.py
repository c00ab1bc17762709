"""Several jobs in one process: each leaves it as it was."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

import zps
from tests.workers import Context


def held() -> tuple[int, int]:
    """(descriptors, shared segments) of this process."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().count("memfd:zps-")
    return len(os.listdir("/proc/self/fd")), maps


def train_again_and_again(ctx: Context) -> list[tuple[int, int]]:
    model = torch.nn.Linear(8, 8)
    counts = []
    for _ in range(4):
        with ctx.worker() as worker:
            opt = zps.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, worker=worker)
            opt.zero_grad()
            model(torch.ones(1, 8)).sum().backward()
            opt.step()
        model(torch.ones(1, 8)).sum().backward()  # the model outlives the job
        ctx.meet()
        counts.append(held())
    return counts


def test_a_job_that_is_over_leaves_no_memory_and_no_descriptor(run):
    for first, *rest in run(train_again_and_again):
        assert rest == [first] * len(rest)


def init_in_a_forked_child() -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            zps.init()
            code = 0 if zps.world_size() == 1 else 2
            zps.shutdown()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_child_may_start_a_job_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in os.environ if name.startswith("ZPS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ZPS_RUNTIME_DIR", str(tmp_path / "run"))
    zps.init()
    try:
        assert init_in_a_forked_child() == 0
        assert zps.rank() == 0  # the parent's own goes on
    finally:
        zps.shutdown()
