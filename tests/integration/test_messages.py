"""What only the message link has to show: bounded memory at the hub, and other hosts."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np
import pytest
import torch

import zps
from tests.training.reference import assert_close
from tests.workers import PATIENCE_S, Context, at_once, together
from zps import Worker
from zps.errors import ConfigError, HubLost
from zps.memory.control import Outcome
from zps.wire import messages as m
from zps.worker.message_link import INLINE_BYTES, MessageLink
from zps.worker.shm_link import ShmLink

LARGE = INLINE_BYTES // 4 * 3 + 1  # fp32 elements: never taken along by the push
HUB = {"bucket_bytes": 16384, "hub_buffer_bytes": 32768}


def test_a_hub_with_little_room_takes_large_gradients_in_any_order(crew):
    tensors = {"a": torch.zeros(LARGE), "b": torch.zeros(LARGE)}
    hub = crew.hub(**HUB)
    with together(hub.address, tensors, "sum", link="message") as workers:
        for round_ in range(3):
            works = []
            for worker, names in zip(workers, ("ab", "ba"), strict=True):
                for name in names:
                    grad = torch.full((LARGE,), 1.0 + worker.rank + round_)
                    works.append(worker.push({name: grad}))
            at_once(*(work.wait for work in works))
            for worker in workers:
                for name in tensors:
                    assert bool((worker.weights(name) == 3.0 + 2 * round_).all())


@pytest.mark.parametrize("room", [{}, HUB], ids=["much room", "little room"])
def test_what_was_pushed_counts_though_its_worker_leaves_at_once(crew, room):
    hub = crew.hub(**room)
    with together(hub.address, {"w": torch.zeros(LARGE)}, "sum", link="message") as (first, last):
        first.push({"w": torch.ones(LARGE)})
        work = last.push({"w": torch.ones(LARGE)})
        at_once(first.close, work.wait)
        assert bool((last.weights("w") == 2.0).all())


def test_a_worker_that_leaves_says_what_is_lost_when_the_hub_has_no_room_in_time(crew, caplog):
    hub = crew.hub(**HUB)
    with together(hub.address, {"w": torch.zeros(LARGE)}, link="message", timeout_s=0.2) as workers:
        workers[0].push({"w": torch.ones(LARGE)})  # nobody else does, and it takes all the room
        workers[0].close()
    assert "rank 0 leaves, and gradients that it pushed are lost" in caplog.text


def clipped_rounds(ctx: Context, rounds: int) -> torch.Tensor:
    param = torch.nn.Parameter(torch.ones(LARGE))
    worker = ctx.worker(link="message")
    sgd = torch.optim.SGD([param], lr=0.1, momentum=0.9)
    opt = zps.Optimizer(sgd, worker=worker, max_grad_norm=1.0)
    for round_ in range(rounds):
        param.grad = torch.full_like(param, 1.0 + ctx.rank + round_)
        opt.step()
    return param.detach().clone()


def test_a_round_that_is_judged_as_a_whole_may_be_larger_than_the_room(run):
    results = run(clipped_rounds, 3, hub=HUB)
    param = torch.nn.Parameter(torch.ones(LARGE))
    sgd = torch.optim.SGD([param], lr=0.1, momentum=0.9)
    for round_ in range(3):
        param.grad = torch.full_like(param, 1.5 + round_)
        torch.nn.utils.clip_grad_norm_([param], 1.0)
        sgd.step()
    for result in results:
        assert_close([result], [param.detach()])


@pytest.mark.parametrize("mode", ["ssp", "async"])
def test_out_of_step_each_workers_whole_round_may_be_larger_than_the_room(run, mode):
    results = run(clipped_rounds, 4, hub={"mode": mode, **HUB})
    for result in results:
        assert bool(result.isfinite().all())
        assert bool((result < 1.0).all())


def test_a_worker_that_reads_no_weights_keeps_no_other_waiting(crew):
    room = 256 << 10
    hub = crew.hub(mode="async", bucket_bytes=room // 2, hub_buffer_bytes=room)
    weights = torch.arange(4.0 * (1 << 20))  # more than what sockets take before they are full
    with together(hub.address, {"w": weights}, "add", link="message") as (idle, busy):
        session = idle.channels[0].session
        with session.sequenced() as seq:
            every = list(range(len(idle.layout.buckets)))
            session.send(m.Pull(**session.header(seq), buckets=every, whole=False))
        assert session._dealer.socket.poll(PATIENCE_S * 1000)  # the hub is at it
        busy.push({"w": torch.ones_like(weights)}).wait()
        busy.pull()
        assert torch.equal(busy.weights("w"), weights + 1.0)


def test_workers_may_differ_in_their_link(crew):
    hub = crew.hub()
    tensors = {"w": torch.zeros(LARGE)}
    with (
        Worker(hub.address, rank=0, world_size=2, link="message") as remote,
        Worker(hub.address, rank=1, world_size=2) as local,
    ):
        at_once(*(lambda w=w: w.declare(tensors, "mean") for w in (remote, local)))
        assert isinstance(remote.channels[0].link, MessageLink)
        assert isinstance(local.channels[0].link, ShmLink)
        for round_ in range(3):
            works = [
                w.push({"w": torch.full((LARGE,), float(round_ + 2 * w.rank))})
                for w in (remote, local)
            ]
            at_once(*(work.wait for work in works))
            for worker in (remote, local):
                assert bool((worker.weights("w") == round_ + 1.0).all())


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers of this process seem to run on another host."""
    monkeypatch.setattr("zps.worker.session.host_id", lambda: "elsewhere/1")


def test_a_worker_on_another_host_needs_nothing_of_this_one(crew, monkeypatch):
    elsewhere(monkeypatch)
    with together(crew.hub().address, {"w": torch.ones(5)}, world=1) as (worker,):
        assert isinstance(worker.channels[0].link, MessageLink)
        worker.push({"w": torch.arange(5.0)}).wait()
        assert worker.weights("w").tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_shared_memory_with_another_host_is_refused_with_a_reason(crew, monkeypatch):
    elsewhere(monkeypatch)
    refused = pytest.raises(ConfigError, match=r"another host.*ZPS_LINK=auto")
    with Worker(crew.hub().address, rank=0, world_size=1, link="shm") as worker, refused:
        worker.declare({"w": torch.ones(5)})


def cut_off(ctx: Context, ranks: int) -> Any:
    """The last rank, on another host, dies in the middle of a round; the others go on."""
    patch = pytest.MonkeyPatch()
    elsewhere(patch)
    try:
        worker = ctx.worker()
    finally:
        patch.undo()
    worker.declare({"w": torch.zeros(LARGE)}, "sum")
    worker.push({"w": torch.ones(LARGE)}).wait()
    if ctx.rank == ranks - 1:
        # Its connection is all the hub knows of it.
        worker._session._dealer.socket.close(linger=0)
        worker._session._context.destroy(linger=0)
        worker._session._pid = -1
        return None
    worker.push({"w": torch.ones(LARGE)}).wait()
    return worker.weights("w")[0].item()


def test_a_worker_on_another_host_is_missed_when_its_connection_ends(run):
    assert run(cut_off, 3, world=3) == [2.0, 2.0, None]


def test_a_hub_on_another_host_is_lost_with_its_connection(crew, monkeypatch):
    elsewhere(monkeypatch)
    hub = crew.hub(staleness=9)  # of this test alone
    with together(hub.address, {"w": torch.zeros(LARGE)}, world=2) as workers:
        work = workers[0].push({"w": torch.ones(LARGE)})
        os.kill(hub.pid, signal.SIGKILL)
        with pytest.raises(HubLost, match="connection to the hub at .* has ended"):
            work.wait(PATIENCE_S)


def test_what_is_not_contiguous_and_every_dtype_travels(crew):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        start = torch.arange(12, dtype=dtype).reshape(3, 4)
        with together(crew.hub().address, {"w": start}, world=1, link="message") as (worker,):
            assert torch.equal(worker.weights("w"), start)
            worker.push({"w": start.t().contiguous().t() * 2}).wait()
            assert torch.equal(worker.weights("w"), start * 2)
            assert np.shares_memory(
                worker.weights("w").view(torch.uint8).numpy(), worker.channels[0].link.weights
            )


@pytest.mark.parametrize("mode", ["ssp", "async"])
def test_out_of_step_weights_come_when_they_are_pulled_whatever_is_set(crew, mode):
    hub = crew.hub(mode=mode)
    with together(
        hub.address, {"w": torch.zeros(9)}, "add", world=1, link="message", pull="alias"
    ) as (worker,):
        worker.push({"w": torch.ones(9)}).wait()
        worker.pull()
        assert bool((worker.weights("w") == 1.0).all())


def test_a_fast_worker_does_not_take_the_room_of_those_it_waits_for(crew):
    """ssp: what would only be kept is not asked for, or the slow one could never send."""
    hub = crew.hub(mode="ssp", staleness=1, **HUB)
    with together(hub.address, {"w": torch.zeros(LARGE)}, "add", link="message") as (fast, slow):
        fast.push({"w": torch.ones(LARGE)}).wait()
        ahead = fast.push({"w": torch.ones(LARGE)})  # waits for the other
        assert not ahead.done()
        at_once(slow.push({"w": torch.ones(LARGE)}).wait, ahead.wait)
        fast.pull()
        assert bool((fast.weights("w") == 3.0).all())


def test_a_late_worker_is_heard_though_others_have_filled_the_room(crew):
    """quorum: its late push has to be answered before it can go on."""
    hub = crew.hub(quorum=0.6, **HUB)
    with together(hub.address, {"w": torch.zeros(LARGE)}, "add", world=3, link="message") as three:
        late, *others = three
        first = [w.push({"w": torch.ones(LARGE)}) for w in others]
        at_once(*(work.wait for work in first))
        second = others[0].push({"w": torch.ones(LARGE)})  # one of three: not enough
        assert not second.done()
        outcomes = at_once(late.push({"w": torch.ones(LARGE)}).wait)[0].outcomes
        assert set(outcomes) == {Outcome.LATE}
        late.refresh()
        at_once(late.push({"w": torch.ones(LARGE)}).wait, second.wait)
