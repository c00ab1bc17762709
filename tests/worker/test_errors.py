"""What a worker is told when something is wrong: the right error, the facts, and a way on."""

from __future__ import annotations

import os
import re
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from tests.workers import Crew, at_once, together
from zps import Settings, Worker
from zps.errors import (
    Closed,
    ConfigError,
    DuplicateName,
    DuplicateRank,
    ForkedProcess,
    GradientError,
    HubUnreachable,
    LayoutError,
    LayoutMismatch,
    NonFiniteGradient,
    NotDeclared,
    OutOfMemory,
    ProtocolError,
    RankOutOfRange,
    Rejected,
    TensorMismatch,
    UnknownName,
    WaitTimeout,
)
from zps.hub.process import HubProcess
from zps.hub.roster import Roster
from zps.memory.control import Outcome
from zps.wire import messages as m
from zps.wire.sockets import Router

X = {"x": torch.ones(4)}


@pytest.fixture
def hub(crew: Crew) -> str:
    return crew.hub().address


# --- names and tensors --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "error", "text"),
    [
        ({"y": torch.ones(4)}, UnknownName, "declared no tensor 'y'; there are ['x', 'z']"),
        ("y", UnknownName, "no tensor 'y'"),
        (["x", "y"], UnknownName, "no tensor 'y'"),
        ({"x": torch.ones(5)}, TensorMismatch, "float32 (5,), but float32 (4,) was declared"),
        ({"x": torch.ones(2, 2)}, TensorMismatch, "float32 (2, 2)"),
        ({"x": torch.ones(4).double()}, TensorMismatch, "float64 (4,)"),
        ({"x": torch.ones(4).bfloat16()}, TensorMismatch, "bfloat16 (4,)"),
        ({"x": torch.ones(4).to_sparse()}, TensorMismatch, "sparse"),
        ({"z": torch.ones(1), "x": torch.ones(5)}, TensorMismatch, "(5,)"),
        ({"x": torch.tensor([1, float("nan"), 1, 1])}, NonFiniteGradient, "'x' on rank 0"),
        ({"x": torch.tensor([1, 1, 1, -float("inf")])}, NonFiniteGradient, "not sent"),
        ({"z": torch.ones(1), "x": torch.full((4,), float("nan"))}, NonFiniteGradient, "'x'"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_it_leaves(hub, what, error, text):
    start = {"x": torch.zeros(4), "z": torch.zeros(1)}
    with together(hub, start, world=1) as (worker,):
        with pytest.raises(error, match=re.escape(text)):
            worker.push(what)
        assert worker.stats()["versions"] == 0
        worker.push({"x": torch.full((4,), 2.0)}).wait()
        assert worker.weights("x").tolist() == [2.0] * 4


def test_a_slot_with_nan_is_refused_before_it_leaves(hub):
    with together(hub, X, world=1) as (worker,):
        worker.slot("x")[2] = float("nan")
        with pytest.raises(NonFiniteGradient, match="'x' on rank 0"):
            worker.push("x")
        worker.slot("x")[2] = 0
        worker.push("x").wait()


@pytest.mark.parametrize("samples", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused_before_it_leaves(hub, samples):
    with together(hub, X, world=1) as (worker,):
        with pytest.raises(GradientError, match=f"samples={samples}"):
            worker.push(X, samples=samples)
        worker.push(X).wait(5)


def test_a_round_with_a_gradient_that_is_not_finite_may_be_skipped_or_allowed(hub):
    bad = {"x": torch.tensor([1.0, float("nan"), 1.0, 1.0])}
    with together(hub, X, "add", nonfinite="skip") as (first, second):
        works = [first.push(bad), second.push(X)]
        assert [work.wait().outcomes for work in works] == [(Outcome.APPLIED,)] * 2
        assert second.weights("x").tolist() == [2.0] * 4  # without the first one's share
    with together(hub, X, "add", nonfinite="allow", world=1) as (worker,):
        worker.push(bad).wait()
        assert torch.isnan(worker.weights("x")).tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("tensors", "options", "error", "text"),
    [
        ({"x": torch.ones(2).double()}, {}, TensorMismatch, "'x' has dtype 'float64'"),
        ({"x": torch.ones(2, dtype=torch.int64)}, {}, TensorMismatch, "cast to float32"),
        (X, {"extras": {"x": torch.ones(1)}}, DuplicateName, "'x' is declared twice"),
        ({"": torch.ones(1)}, {}, LayoutError, "name"),
        (X, {"rule": "lamb"}, ConfigError, "there is no rule 'lamb'; the rules are"),
        (X, {"rule": "os.system"}, ConfigError, "ZPS_OPTIMIZERS=os.system"),
        (X, {"rule": "sgd", "pace": 1.0}, ConfigError, "pace"),
        (X, {"rule": "sgd", "lr": -1.0}, ConfigError, "lr"),
        (X, {"rule": "sgd", "lr": {1}}, ConfigError, "cannot be sent"),
        (X, {"groups": [{"params": ["y"]}]}, UnknownName, "'y'"),
        (X, {"groups": [{"params": []}]}, ProtocolError, "parameter 0 is in no group"),
        (X, {"max_grad_norm": -1.0}, ConfigError, "max_grad_norm must be a positive number"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused_and_may_be_mended(
    hub, tensors, options, error, text
):
    with Worker(hub, rank=0, world_size=1, timeout_s=10) as worker:
        with pytest.raises(error, match=re.escape(text)):
            worker.declare(tensors, **options)
        worker.declare(X)
        worker.push(X).wait()


def test_a_second_declaration_is_refused(hub):
    with together(hub, X, world=1) as (worker,):
        with pytest.raises(LayoutError, match="declared its tensors already"):
            worker.declare(X)
        worker.push(X).wait()


def test_a_model_in_too_many_buckets_says_what_to_change(hub):
    huge = {"x": torch.empty(1 << 40, device="meta")}
    worker = Worker(hub, rank=0, world_size=1, timeout_s=10, bucket_bytes="4KiB")
    with (
        worker,
        pytest.raises(LayoutError, match="more than 65536 buckets.*raise ZPS_BUCKET_BYTES"),
    ):
        worker.declare(huge)


def test_another_model_on_another_rank_is_named(hub):
    workers = [Worker(hub, rank=rank, world_size=2, timeout_s=10) for rank in range(2)]
    with workers[0], workers[1]:
        done = threading.Event()

        def declare_wrongly_then_rightly() -> None:
            with pytest.raises(
                LayoutMismatch, match=r"'x' is \(5,\) on rank 1 but \(4,\) on rank 0"
            ):
                workers[1].declare({"x": torch.zeros(5)})
            with pytest.raises(Rejected, match="the rule is 'mean' on rank 1, 'sum' on rank 0"):
                workers[1].declare(X, "mean")
            workers[1].declare(X)
            done.set()

        at_once(lambda: workers[0].declare(X), declare_wrongly_then_rightly)
        assert done.is_set()


@pytest.mark.parametrize(
    ("tensors", "extras", "error"),
    [
        ({"y": torch.ones(4)}, None, UnknownName),
        ({"x": torch.ones(5)}, None, TensorMismatch),
        (None, {"x": torch.ones(4)}, UnknownName),
        (None, {"e": torch.ones(1)}, TensorMismatch),
    ],
)
def test_what_cannot_be_published_is_refused_and_nothing_is_written(hub, tensors, extras, error):
    hypers = {"extras": {"e": torch.zeros(2)}}
    with together(hub, X, world=1, hypers=hypers) as (worker,):
        with pytest.raises(error):
            worker.publish(tensors, extras)
        assert worker.weights("x").tolist() == [1.0] * 4
        worker.publish({"x": torch.zeros(4)})
        with pytest.raises(UnknownName, match="no extra 'x'; there are \\['e'\\]"):
            worker.extra("x")


def test_a_model_that_does_not_fit_says_how_much_it_needs(crew):
    hub = crew.hub(bucket_bytes="1GiB").address
    huge = {"x": torch.empty(1 << 42, device="meta")}
    worker = Worker(hub, rank=0, world_size=1, timeout_s=10)
    with worker, pytest.raises(OutOfMemory, match=f"{1 << 44:,} bytes, but only"):
        worker.declare(huge)


# --- the wrong moment ---------------------------------------------------------------------------


def test_before_declaring_nothing_can_be_exchanged(hub):
    with Worker(hub, rank=0, world_size=1) as worker:
        for call in (
            lambda: worker.push(X),
            lambda: worker.slot("x"),
            lambda: worker.weights("x"),
            lambda: worker.pull(),
            lambda: worker.publish(),
            lambda: worker.layout,
        ):
            with pytest.raises(NotDeclared, match=r"rank 0 has to call declare\(\) first"):
                call()
        assert worker.stats()["formed"] is False


def test_after_closing_nothing_can_be_exchanged_but_weights_stay(hub):
    with together(hub, X) as (first, second):
        parked = first.push(X)
        weights = first.weights("x")
        first.close()
        first.close()
        for call in (
            lambda: first.push(X),
            lambda: first.slot("x"),
            lambda: first.weights("x"),
            lambda: first.declare(X),
            lambda: first.barrier(),
            lambda: first.stats(),
            lambda: parked.wait(),
        ):
            with pytest.raises(Closed, match="rank 0 is closed: it was shut down"):
                call()
        assert first.closed
        assert weights.tolist() == [1.0] * 4
        second.push(X).wait()  # nobody waits for a worker that has said goodbye


def test_a_forked_child_may_not_use_the_worker_and_does_it_no_harm(hub):
    with together(hub, X, "add", world=1) as (worker,):
        work = worker.push(X)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for call in (
                    lambda: worker.push(X),
                    lambda: worker.stats(),
                    lambda: worker.slot("x"),
                ):
                    with pytest.raises(ForkedProcess, match="zps.init"):
                        call()
                worker.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        work.wait()
        worker.push(X).wait()
        assert worker.weights("x").tolist() == [3.0] * 4


# --- no way to the hub --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:9", "ipc:///tmp/zps-there-is-no-hub-here/s"], ids=["tcp", "ipc"]
)
def test_a_hub_that_is_not_there_is_named_within_the_connect_timeout(address):
    started = time.monotonic()
    with pytest.raises(HubUnreachable, match=f"{re.escape(address)}.*Is it running"):
        Worker(address, rank=0, world_size=1, connect_timeout_s=0.5)
    assert 0.4 < time.monotonic() - started < 10


def test_a_program_that_is_no_hub_is_not_waited_for_longer(tmp_path):
    """A listener that never speaks takes the connection, and nothing more."""
    import socket

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with pytest.raises(HubUnreachable):
            Worker(f"ipc://{tmp_path}/s", rank=0, world_size=1, connect_timeout_s=0.5)


def test_a_worker_without_an_address_says_how_to_give_one(monkeypatch):
    monkeypatch.delenv("ZPS_HUB", raising=False)
    with pytest.raises(HubUnreachable, match="set ZPS_HUB"):
        Worker(rank=0)


@pytest.mark.parametrize("address", ["here", "udp://1.2.3.4:5", "tcp://host", "ipc://relative"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(ConfigError, match="ipc:///path/to/socket or tcp://host:port"):
        Worker(address, rank=0)


def test_a_hub_is_named_once():
    with pytest.raises(ConfigError, match="names a hub twice"):
        Worker(settings=Settings(hub="tcp://127.0.0.1:1,tcp://127.0.0.1:1"))


@contextmanager
def newer_hub(address: str, **settings: Any) -> Iterator[list[m.Message]]:
    """A hub that welcomes one worker with settings of its own; what it has been sent."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router, sent = Router(context, address, 1 << 20), []
    roster = Roster(Settings())

    def serve() -> None:
        while not sent or not isinstance(sent[-1], m.Bye):
            if not router.socket.poll(20_000):
                return
            route, header = router.receive()[:2]
            sent.append(m.decode(header))
            if isinstance(sent[-1], m.Hello):
                peer, _ = roster.admit(route, sent[-1])
                answer = roster.welcome(peer)
                answer = answer.model_copy(update={"settings": answer.settings | settings})
            else:
                answer = m.Ok(seq=sent[-1].seq)
            router.send(route, [m.encode(answer)])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield sent
    finally:
        thread.join()
        for peer in roster:
            peer.close()
        router.close()
        context.term()


@pytest.mark.parametrize("name", ["compression", "pull_compression"])
def test_a_worker_that_cannot_take_the_hubs_codec_says_so_and_leaves(tmp_path, name):
    address = f"ipc://{tmp_path}/s"
    with (
        newer_hub(address, **{name: "zip9"}) as sent,
        pytest.raises(ConfigError, match="there is no codec 'zip9'") as refused,
    ):
        Worker(address, rank=0, world_size=1)
    assert f"{address} has settings that this worker cannot take" in str(refused.value)
    assert "Install the same version of zps on both sides" in str(refused.value)
    assert [message.tag for message in sent] == ["hello", "bye"]  # its rank is free again


# --- the hub says no ----------------------------------------------------------------------------


def test_a_rank_is_held_by_one_worker(hub):
    with together(hub, X) as (first, _):
        with pytest.raises(DuplicateRank, match="rank 1 is held by a live worker") as caught:
            Worker(hub, rank=1, world_size=2)
        assert caught.value.code == "duplicate_rank"
        with pytest.raises(RankOutOfRange, match="rank 2 is not 0 to 1"):
            Worker(hub, rank=2)
        with pytest.raises(RankOutOfRange, match="the job has 2 workers"):
            Worker(hub)
        assert first.stats()["live"] == [0, 1]


@pytest.mark.parametrize(("rank", "world"), [(-1, 2), (0, 0), (None, -3)])
def test_numbers_that_count_nothing_are_refused(hub, rank, world):
    with pytest.raises(RankOutOfRange, match="ranks count from 0"):
        Worker(hub, rank=rank, world_size=world)


def test_without_a_rank_the_lowest_free_one_is_given(hub):
    with Worker(hub, world_size=3) as first, Worker(hub, rank=2) as third, Worker(hub) as second:
        assert [w.rank for w in (first, second, third)] == [0, 1, 2]
        assert {w.world_size for w in (first, second, third)} == {3}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"mode": "async"}, "mode is 'async' on the worker but 'bsp' on the hub"),
        ({"quorum": 0.5}, "quorum is 0.5 on the worker but 1.0 on the hub"),
        ({"bucket_bytes": "8KiB"}, "bucket_bytes is 8192 on the worker but 4096 on the hub"),
        ({"on_death": "abort"}, "on_death is 'abort' on the worker but 'shrink' on the hub"),
        ({"world_size": 3}, "world_size is 3 on the worker but 2 on the hub"),
    ],
)
def test_settings_that_must_agree_are_named_when_they_do_not(hub, settings, text):
    with Worker(hub, rank=0, world_size=2), pytest.raises(ConfigError, match=text):
        Worker(hub, rank=1, **settings)


def test_settings_that_were_not_chosen_follow_the_hub(crew):
    hub = crew.hub(mode="ssp", staleness=3)
    with Worker(hub.address, rank=0, world_size=1) as worker:
        assert (worker.settings.mode, worker.settings.staleness) == ("ssp", 3)
        assert worker.settings.bucket_bytes == 4096


def test_another_job_is_refused(hub):
    with pytest.raises(Rejected, match="serves job 'default', not 'other'"):
        Worker(hub, rank=0, world_size=1, job="other")


# --- the others do not come ---------------------------------------------------------------------


def test_a_wait_that_ends_too_soon_names_who_is_missing_and_may_go_on(hub):
    with together(hub, X, world=3) as workers:
        work = workers[0].push(X)
        workers[2].push(X)
        with pytest.raises(WaitTimeout, match=r"waited 0.1 s for bucket 0; .* ranks \[1\]"):
            work.wait(0.1)
        assert not work.done()
        with pytest.raises(WaitTimeout):
            work.wait(0)
        workers[1].push(X)
        assert work.wait().done()
        assert workers[0].weights("x").tolist() == [3.0] * 4


def test_a_declaration_names_who_has_not_joined_and_may_be_repeated(hub):
    with Worker(hub, rank=1, world_size=2, timeout_s=0.3) as second:
        with pytest.raises(WaitTimeout, match=r"ranks \[0, 1\] have not joined"):
            second.declare(X)
        with Worker(hub, rank=0, world_size=2, timeout_s=20) as first:
            at_once(lambda: first.declare(X), lambda: second.declare(X))
            for work in [first.push(X), second.push(X)]:
                work.wait(10)


def test_rank_0_hears_who_has_not_joined(hub):
    worker = Worker(hub, rank=0, world_size=3, timeout_s=0.3)
    with worker, pytest.raises(WaitTimeout, match=r"ranks \[1, 2\] have not joined"):
        worker.declare(X)


def test_a_barrier_names_who_has_not_come(hub):
    text = r"no answer to 'barrier' in 0.3 s; the hub waits for ranks \[1, 2\]"
    with (
        together(hub, {}, world=3, timeout_s=0.3) as workers,
        pytest.raises(WaitTimeout, match=text),
    ):
        workers[0].barrier()


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_hub_that_does_not_turn_is_told_apart_from_workers_that_do_not_come(tmp_path: Path):
    settings = Settings(runtime_dir=tmp_path / "run", bucket_bytes=4096)
    with HubProcess.start(settings) as hub, together(hub.address, X, timeout_s=0.2) as workers:
        with stopped(hub.pid):
            with pytest.raises(WaitTimeout, match="the hub does not say why"):
                workers[0].barrier()
            work = workers[1].push(X)
            with pytest.raises(WaitTimeout, match="does not say why|last turned"):
                work.wait()
        workers[0].push(X)
        work.wait(20)


# --- the process around it ----------------------------------------------------------------------


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """All numbers below 1024 are taken, and with them what select() can wait for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip(f"only {hard} descriptors are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    taken = []
    while not taken or taken[-1] < 1023:
        taken.append(os.open("/dev/null", os.O_RDONLY))
    yield
    for fd in taken:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_descriptors_above_1023_are_waited_for_too(tmp_path: Path, many_descriptors: None):
    settings = Settings(runtime_dir=tmp_path / "run", bucket_bytes=4096)
    with HubProcess.start(settings) as hub, together(hub.address, X, timeout_s=20) as workers:
        work = workers[0].push(X)
        with pytest.raises(WaitTimeout, match=r"ranks \[1\]"):
            work.wait(0.2)
        workers[1].push(X).wait()
        work.wait()
