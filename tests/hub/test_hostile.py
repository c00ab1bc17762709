"""A hub and peers that send what no worker sends: it says no, nothing changes, the job goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
import zmq

from tests.hub.raw import Raw
from tests.workers import Crew, at_once
from zps import Worker
from zps.core.layout import Layout
from zps.errors import ProtocolError
from zps.wire import messages as m

#: One bucket for `a`, two for `b`: a bucket has 4096 bytes.
SHAPES = {"a": (8,), "b": (2000,)}
LR = 0.5


class Pair:
    """A job of two: rank 0 is a good worker, rank 1 is whatever the test makes of it."""

    def __init__(self, worker: Worker, raw: Raw, attach: m.Attach):
        self.worker = worker
        self.raw = raw
        self.attach = attach
        self.round = 0

    def weights(self) -> torch.Tensor:
        return torch.cat([self.worker.weights(name) for name in SHAPES]).clone()

    def state(self) -> tuple[dict[str, Any], bytes]:
        return self.worker.stats(), self.weights().numpy().tobytes()

    def finish_round(self, pushed: Callable[[], None] | None = None) -> None:
        """Both push ones in all buckets, and the weights fall by LR."""
        before = self.weights()
        self.raw.slots.bytes.view(np.float32)[:] = 1
        work = self.worker.push({name: torch.ones(shape) for name, shape in SHAPES.items()})
        if pushed is None:
            header = self.raw.push(round=self.round, buckets=[0, 1, 2], bases=[self.round] * 3)
            self.raw.send(header)
        else:
            pushed()
        work.wait()
        self.round += 1
        assert torch.equal(self.weights(), before - LR)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """What happens inside has no effect, and the next round is a good one."""
        before = self.state()
        yield
        assert self.state() == before
        self.finish_round()


@pytest.fixture(scope="module")
def hub(crew: Crew) -> str:
    return crew.hub(job="hostile").address


@pytest.fixture
def raw(hub: str) -> Iterator[Raw]:
    with Raw(hub) as peer:
        yield peer


@pytest.fixture
def pair(hub: str, raw: Raw) -> Iterator[Pair]:
    with ExitStack() as stack:
        worker = Worker(hub, rank=0, world_size=2, job="hostile", timeout_s=20)
        stack.enter_context(worker)
        tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        join = {"rank": 1, "world_size": 2, "job": "hostile"}
        _, attach = at_once(
            lambda: worker.declare(tensors, "sgd", lr=LR),
            lambda: raw.join(SHAPES, "sgd", hypers={"lr": LR}, **join),
        )
        pair = Pair(worker, raw, attach)
        pair.finish_round()
        yield pair


def hypers(*groups: dict[str, Any], max_grad_norm: object = None) -> bytes:
    return msgpack.packb({"groups": list(groups), "max_grad_norm": max_grad_norm})


Bad = Callable[[Raw], tuple[Any, ...]]


def push(*payload: bytes, **fields: Any) -> Bad:
    """A push of round 1 as it should be, bent."""
    return lambda raw: (raw.push(**{"round": 1, "bases": [1], **fields}), *payload)


def request(tag: str, *payload: bytes, **fields: Any) -> Bad:
    return lambda raw: (raw.header(tag, **fields), *payload)


STATE = {"what": "state", "field": "momentum_buffer", "index": 0}
BAD: dict[str, tuple[Bad, str, str]] = {
    "no bucket": (push(buckets=[3]), "ProtocolError", "this hub has 3"),
    "one bucket of several": (push(buckets=[0, 9], bases=[1, 1]), "ProtocolError", "bucket 9"),
    "a version to come": (push(bases=[2]), "ProtocolError", "computed on version 2"),
    "a version to come, behind a good one": (
        push(buckets=[0, 1], bases=[1, 99]),
        "ProtocolError",
        "computed on version 99",
    ),
    "a round that runs away": (push(round=500), "ProtocolError", "must wait"),
    "a bucket twice": (push(buckets=[1, 1], bases=[1, 1]), "ProtocolError", "names a bucket twice"),
    "fewer versions than buckets": (push(buckets=[0, 1]), "ProtocolError", "frames"),
    "more versions than buckets": (push(bases=[1, 1]), "ProtocolError", "frames"),
    "a frame that was not announced": (push(b"x"), "ProtocolError", "frames"),
    "hyperparameters that were announced": (push(hypers=True), "ProtocolError", "frames"),
    "half an index": (push(b"\0\0\0", absent=True), "ProtocolError", "3 bytes are no array"),
    "more absent than there are": (push(b"\0" * 12, absent=True), "ProtocolError", "more absent"),
    "negative samples": (push(samples=-1.0), "ProtocolError", "samples=-1.0"),
    "a scale of zero": (push(grad_scale=0.0), "ProtocolError", "grad_scale=0.0"),
    "samples that are no number": (push(samples=float("nan")), "ProtocolError", "finite"),
    "hyperparameters that are none": (push(b"\xc1", hypers=True), "ProtocolError", "MessagePack"),
    "a group too many": (push(hypers({}, {}), hypers=True), "ProtocolError", "number of"),
    "no groups": (push(hypers(), hypers=True), "ProtocolError", "groups"),
    "groups that are none": (push(msgpack.packb({"groups": {}}), hypers=True), "ProtocolError", ""),
    "an unknown hyperparameter": (push(hypers({"pace": 1}), hypers=True), "ConfigError", "pace"),
    "a negative rate": (push(hypers({"lr": -1.0}), hypers=True), "ConfigError", "lr"),
    "a rate that is no number": (
        push(hypers({"lr": float("nan")}), hypers=True),
        "ConfigError",
        "lr",
    ),
    "a limit of zero": (push(hypers({}, max_grad_norm=0), hypers=True), "ConfigError", "positive"),
    "a limit in words": (push(hypers({}, max_grad_norm="1"), hypers=True), "ConfigError", "number"),
    "huge hyperparameters": (
        push(hypers({"lr": [[{}] * 1_000_000] * 10}), hypers=True),
        "ProtocolError",
        "lists and maps",
    ),
    "a state that the rule has not": (
        request("read", **{**STATE, "field": "exp_avg"}),
        "ProtocolError",
        "this rule has ['momentum_buffer']",
    ),
    "a state that is not in use": (request("read", **STATE), "ProtocolError", "not in use"),
    "weights of no bucket": (
        request("read", what="weights", field="", index=3),
        "ProtocolError",
        "no bucket 3",
    ),
    "a foreign rule's state": (
        request("read", what="foreign", field="", index=0),
        "ProtocolError",
        "foreign",
    ),
    "a state to a foreign rule": (
        request("write", b"x", what="foreign", field="", index=0),
        "ProtocolError",
        "foreign",
    ),
    "a state of another length": (request("write", b"x", **STATE), "ProtocolError", "1 bytes came"),
    "no step counts": (request("set_steps"), "ProtocolError", "1 payload frame expected"),
    "half a step count": (request("set_steps", b"abc"), "ProtocolError", "3 bytes are no array"),
    "a step count too few": (request("set_steps", bytes(8)), "ProtocolError", "2 step counts"),
    "steps below zero": (request("set_steps", b"\xff" * 16), "ProtocolError", "2 step counts"),
    "an old epoch": (
        lambda raw: ({**raw.push(round=1, bases=[1]), "epoch": raw.epoch - 1},),
        "old_session",
        "earlier life",
    ),
    "an old session": (
        lambda raw: ({**raw.push(round=1, bases=[1]), "session": raw.session - 1},),
        "old_session",
        "rejoin",
    ),
    "a session to come": (
        lambda raw: ({**raw.header("bye", failed=False), "session": raw.session + 1},),
        "old_session",
        "rejoin",
    ),
    "a hello of another rank": (
        lambda raw: (raw.hello(rank=0, world_size=2, job="hostile"),),
        "duplicate_hello",
        "belongs to rank 1 already",
    ),
    "a message for workers": (lambda raw: ({"t": "ok", "seq": 1},), "ProtocolError", "for workers"),
    "an end of the job": (
        lambda raw: ({"t": "closing", "text": "now"},),
        "ProtocolError",
        "a closing message is for workers",
    ),
    "an unknown message": (request("van"), "ProtocolError", "unknown message 'van'"),
    "garbage": (lambda raw: (os.urandom(300),), "ProtocolError", ""),
    "an empty frame": (lambda raw: (b"",), "ProtocolError", "MessagePack"),
    "a header over 4 KiB": (lambda raw: (bytes(5000),), "ProtocolError", "5000 bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_member_is_refused_and_nothing_changes(pair: Pair, name: str) -> None:
    bad, code, text = BAD[name]
    with pair.unchanged():
        refusal = pair.raw.refused(*bad(pair.raw))
        assert refusal.code == code
        assert text in refusal.text


@pytest.mark.parametrize("name", ["garbage", "a bucket twice", "an end of the job", "no bucket"])
def test_a_stranger_is_refused_and_nothing_changes(hub: str, pair: Pair, name: str) -> None:
    with pair.unchanged(), Raw(hub) as stranger:
        stranger.epoch, stranger.session = pair.raw.epoch, pair.raw.session
        stranger.seq = pair.raw.seq
        stranger.refused(*BAD[name][0](stranger))
        answer = stranger.refused(stranger.push(round=1, bases=[1]))
        assert answer.code == "no_session"
        assert "say hello first" in answer.text
        stranger.session = 0  # it has no goodbye to say


def test_a_declaration_that_comes_again_is_answered_again_and_changes_nothing(pair: Pair) -> None:
    with pair.unchanged():
        pair.raw.send(*pair.raw.declaration(SHAPES, "sgd", {"lr": 7.0}))
        attach = pair.raw.expect(m.Attach)
        assert attach.formed
        assert attach.slots == pair.attach.slots


# --- pushes that come twice ---------------------------------------------------------------------


def test_a_push_that_comes_again_is_not_applied_again(pair: Pair) -> None:
    header = pair.raw.push(round=1, buckets=[0, 1, 2], bases=[1] * 3)

    def three_times() -> None:
        for _ in range(3):
            pair.raw.send(header)

    pair.finish_round(three_times)
    before = pair.state()
    pair.raw.send(header)
    assert pair.raw.stats() == before[0]
    with pair.unchanged():
        pass


def test_a_push_into_a_slot_that_was_not_taken_yet_is_refused(pair: Pair) -> None:
    first = pair.raw.push(round=1, buckets=[0, 1, 2], bases=[1] * 3)

    def push_twice() -> None:
        pair.raw.send(first)
        again = pair.raw.refused(pair.raw.push(round=2, buckets=[2], bases=[1]))
        assert again.code == "slot_busy"
        assert "bucket 2" in again.text

    before = pair.weights()
    pair.raw.slots.bytes.view(np.float32)[:] = 1
    push_twice()
    work = pair.worker.push({name: torch.ones(shape) for name, shape in SHAPES.items()})
    work.wait()
    pair.round += 1
    assert torch.equal(pair.weights(), before - LR)
    with pair.unchanged():
        pass


def test_a_request_that_comes_again_is_answered_again_and_not_done_again(pair: Pair) -> None:
    first, second = (np.full(16, value, np.float32).tobytes() for value in (1, 2))
    header = pair.raw.header("write", **STATE)
    pair.raw.send(header, first)
    once = pair.raw.expect(m.Ok)
    pair.raw.send(header, second)
    assert pair.raw.expect(m.Ok) == once
    pair.raw.send(pair.raw.header("read", **STATE))
    pair.raw.expect(m.Ok)
    assert pair.raw.payload == [first]


def test_a_hello_that_comes_again_is_answered_with_the_same_session(hub: str, raw: Raw) -> None:
    hello = raw.hello(job="hostile")
    raw.send(hello)
    first = raw.expect(m.Welcome)
    raw.send(hello)
    assert raw.expect(m.Welcome) == first
    raw.epoch, raw.session, raw.seq = first.epoch, first.session, first.session << 32


def test_a_hello_overheard_does_not_give_the_session_away(hub: str, raw: Raw) -> None:
    hello = raw.hello(job="hostile", world_size=2)
    raw.send(hello)
    welcome = raw.expect(m.Welcome)
    raw.epoch, raw.session, raw.seq = welcome.epoch, welcome.session, welcome.session << 32
    with Raw(hub) as thief:
        assert thief.refused(hello).code == "duplicate_hello"
    assert raw.stats()["live"] == [0]


# --- the handshake ------------------------------------------------------------------------------

HELLOS: dict[str, tuple[dict[str, Any], str, str]] = {
    "another protocol": ({"protocol": 2}, "protocol", "the hub speaks protocol 1, the worker 2"),
    "another job": ({"job": "other"}, "job", "serves job 'hostile', not 'other'"),
    "another host": ({"host": "elsewhere/1"}, "other_host", "does not share the hub's host"),
    "another mode": (
        {"settings": {"mode": "ssp"}},
        "settings",
        "mode is 'ssp' on the worker but 'bsp' on the hub",
    ),
    "another bucket size": (
        {"settings": {"mode": "bsp", "bucket_bytes": 8192}},
        "settings",
        "bucket_bytes is 8192 on the worker but 4096",
    ),
    "another world": ({"world_size": 3}, "settings", "world_size is 3 on the worker but 2"),
    "a rank beyond the world": ({"rank": 2}, "rank_out_of_range", "rank 2 is not 0 to 1"),
    "a rank that is taken": ({"rank": 1}, "duplicate_rank", "rank 1 is held by a live worker"),
    "no free rank": ({"rank": None}, "rank_out_of_range", "the job has 2 workers"),
}


@pytest.mark.parametrize("name", HELLOS)
def test_a_hello_that_does_not_fit_is_refused_with_the_reason(
    hub: str, pair: Pair, name: str
) -> None:
    changes, code, text = HELLOS[name]
    with pair.unchanged(), Raw(hub) as stranger:
        refusal = stranger.refused(stranger.hello(**{"job": "hostile", "world_size": 2, **changes}))
        assert refusal.code == code
        assert text in refusal.text


def test_a_process_that_is_not_there_cannot_join(hub: str, raw: Raw) -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    for pid in (done.pid, (1 << 31) - 1):
        assert raw.refused(raw.hello(pid=pid, job="hostile")).code == "gone"
    assert raw.refused(raw.hello(pid=(1 << 32) - 1, job="hostile")).code == "ProtocolError"
    raw.greet(job="hostile")  # the rank is as free as before
    assert raw.stats()["live"] == [0]


def test_a_world_of_billions_costs_nothing(hub: str, raw: Raw) -> None:
    assert raw.refused(raw.hello(world_size=(1 << 32) - 1, job="hostile")).code == "ProtocolError"
    raw.greet(world_size=1 << 16, job="hostile")
    assert raw.stats()["world_size"] == 1 << 16


# --- too early ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["publish", "set_steps"])
def test_what_needs_a_declaration_is_refused_before_it(hub: str, raw: Raw, tag: str) -> None:
    raw.greet(job="hostile")
    for header in (raw.push(), raw.header(tag), raw.header("read", **STATE)):
        refusal = raw.refused(header)
        assert refusal.code == "not_declared"
        assert "rank 0 has not declared its parameters" in refusal.text
    assert raw.stats()["versions"] == 0


def test_a_push_before_the_first_weights_is_refused(hub: str, raw: Raw) -> None:
    raw.greet(job="hostile")
    raw.send(*raw.declaration(SHAPES))
    raw.expect(m.Attach)
    assert raw.refused(raw.push()).code == "not_formed"
    raw.send(raw.header("publish"))
    raw.expect(m.Ok)
    raw.send(raw.push())
    assert raw.stats()["versions"] == 1


# --- declarations -------------------------------------------------------------------------------


def layout_frame(raw: Raw, *params: list[Any], bucket_bytes: int = 4096) -> tuple[Any, ...]:
    wire = [bucket_bytes, True, False, list(params), []]
    header = raw.header("declare", layout_hash="0" * 64, rule="sum")
    return header, m.pack(wire), hypers({"params": list(range(len(params)))})


DECLARATIONS: dict[str, tuple[Callable[[Raw], tuple[Any, ...]], str, str]] = {
    "one frame": (lambda r: r.declaration(SHAPES)[:2], "ProtocolError", "2 payload frames"),
    "another hash": (
        lambda r: layout_frame(r, ["a", [4], "float32"]),
        "ProtocolError",
        "does not match its hash",
    ),
    "more buckets than memory": (
        lambda r: layout_frame(r, ["a", [1 << 45], "float32"], bucket_bytes=64),
        "ProtocolError",
        "more than 65536 buckets",
    ),
    "more bytes than addresses": (
        lambda r: layout_frame(r, ["a", [1 << 47, 1 << 47], "float32"]),
        "ProtocolError",
        "not valid",
    ),
    "a negative shape": (
        lambda r: layout_frame(r, ["a", [-1], "float32"]),
        "ProtocolError",
        "shape",
    ),
    "a parameter in no group": (
        lambda r: (*r.declaration(SHAPES)[:2], hypers({"params": [0]})),
        "ProtocolError",
        "parameter 1 is in no group",
    ),
    "a parameter in two groups": (
        lambda r: (*r.declaration(SHAPES)[:2], hypers({"params": [0, 1]}, {"params": [0]})),
        "ProtocolError",
        "lists parameter 0 wrongly",
    ),
    "a parameter that is not there": (
        lambda r: (*r.declaration(SHAPES)[:2], hypers({"params": [0, 1, 2]})),
        "ProtocolError",
        "lists parameter 2 wrongly",
    ),
    "parameters that are no list": (
        lambda r: (*r.declaration(SHAPES)[:2], hypers({"params": 7})),
        "ProtocolError",
        "are not a list",
    ),
    "an unknown rule": (lambda r: r.declaration(SHAPES, "lamb"), "ConfigError", "the rules are"),
    "a class the hub may not import": (
        lambda r: r.declaration(SHAPES, "os.system"),
        "ConfigError",
        "may not run 'os.system'",
    ),
    "a class that is none": (
        lambda r: r.declaration(SHAPES, "torch.optim.Nothing"),
        "ConfigError",
        "cannot import",
    ),
    "a class that steps whole tensors, and a layout that cuts them": (
        lambda r: r.declaration(SHAPES, "torch.optim.NAdam"),
        "ProtocolError",
        "steps whole tensors",
    ),
    "a class that is no optimizer": (
        lambda r: r.declaration(SHAPES, "torch.optim.lr_scheduler.StepLR"),
        "ConfigError",
        "not a torch.optim.Optimizer",
    ),
}


@pytest.mark.parametrize("name", DECLARATIONS)
def test_a_bad_declaration_is_refused_and_a_good_one_follows(hub: str, raw: Raw, name: str) -> None:
    bad, code, text = DECLARATIONS[name]
    raw.greet(job="hostile")
    refusal = raw.refused(*bad(raw))
    assert refusal.code == code
    assert text in refusal.text
    raw.send(*raw.declaration(SHAPES))
    raw.expect(m.Attach)


def test_what_does_not_fit_into_memory_is_refused_and_leaves_nothing(crew: Crew, raw: Raw) -> None:
    hub = crew.hub(job="hostile")
    raw.greet(job="hostile")
    wire = [1 << 34, True, False, [["a", [1 << 45], "float32"]], []]
    digest = Layout.from_wire(wire).hash
    held = []
    for _ in range(4):
        header = raw.header("declare", layout_hash=digest, rule="sum")
        refusal = raw.refused(header, m.pack(wire), hypers({"params": [0]}))
        assert refusal.code == "out_of_memory"
        assert f"{1 << 47:,} bytes, but only" in refusal.text
        held.append(len(os.listdir(f"/proc/{hub.pid}/fd")))
    assert max(held) == held[0]  # earlier connections may still be going


OTHERS: dict[str, tuple[Callable[[Raw], tuple[Any, ...]], str, str]] = {
    "another shape": (
        lambda r: r.declaration({"a": (8,), "b": (2001,)}, "sgd"),
        "layout",
        "parameter 'b' is (2001,) on rank 1 but (2000,) on rank 0",
    ),
    "a parameter too few": (
        lambda r: r.declaration({"a": (8,)}, "sgd"),
        "layout",
        "parameter 'b' of rank 0 is missing on rank 1",
    ),
    "another rule": (
        lambda r: r.declaration(SHAPES, "adam"),
        "rule",
        "the rule is 'adam' on rank 1, 'sgd' on rank 0",
    ),
    "other groups": (
        lambda r: (*r.declaration(SHAPES, "sgd")[:2], hypers({"params": [0]}, {"params": [1]})),
        "groups",
        "rank 1 has its parameters in other groups than rank 0",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused_and_the_right_one_may_follow(
    hub: str, raw: Raw, name: str
) -> None:
    bad, code, text = OTHERS[name]
    with Raw(hub) as first:
        first.greet(job="hostile", world_size=2)
        first.send(*first.declaration(SHAPES, "sgd"))
        first.expect(m.Attach)
        raw.greet(job="hostile", rank=1, world_size=2)
        refusal = raw.refused(*bad(raw))
        assert refusal.code == code
        assert text in refusal.text
        raw.send(*raw.declaration(SHAPES, "sgd"))
        raw.expect(m.Attach)
        for peer in (raw, first):
            peer.send(peer.header("publish"))
        for peer in (raw, first):
            peer.expect(m.Ok)
        assert raw.stats()["formed"]


def test_declarations_before_rank_0_are_answered_once_it_has_come(hub: str, raw: Raw) -> None:
    raw.greet(job="hostile", rank=1, world_size=2)
    raw.send(*raw.declaration(SHAPES))
    header, *payload = raw.declaration(SHAPES)  # it has asked again: this one counts
    raw.send(header, *payload)
    assert raw.stats()["formed"] is False
    with Raw(hub) as first:
        first.greet(job="hostile", world_size=2)
        first.send(*first.declaration(SHAPES))
        first.expect(m.Attach)
        assert raw.expect(m.Attach).seq == header["seq"]
        assert raw.stats()["live"] == [0, 1]


# --- floods -------------------------------------------------------------------------------------


def test_a_thousand_garbage_messages_do_not_disturb_a_running_job(hub: str, pair: Pair) -> None:
    with Raw(hub) as stranger:
        for _ in range(20):
            for _ in range(50):
                stranger.send(os.urandom(100))
            pair.finish_round()
        for _ in range(1000):
            stranger.expect(m.Refuse)
    with pair.unchanged():
        pass


def test_a_peer_that_never_stops_does_not_stop_the_others(hub: str, pair: Pair) -> None:
    ended = threading.Event()
    sent = 0

    def flood() -> None:
        nonlocal sent
        with Raw(hub) as stranger:
            stranger.socket.sndhwm = 0
            while not ended.is_set():
                stranger.send(b"\xc1")
                sent += 1

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        for _ in range(10):
            pair.finish_round()
    finally:
        ended.set()
        thread.join()
    assert sent > 100


def test_a_frame_over_the_limit_ends_the_connection_and_nothing_else(hub: str, pair: Pair) -> None:
    with pair.unchanged(), Raw(hub) as stranger:
        events = stranger.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        stranger.send(stranger.hello(job="hostile"), bytes(20 << 20))
        assert events.poll(20_000)


def test_a_message_of_many_frames_is_refused(hub: str, pair: Pair) -> None:
    with pair.unchanged():
        pair.raw.refused(pair.raw.push(round=1, bases=[1]), *[b"x"] * 1000)


def test_nobody_waits_for_a_peer_that_reads_nothing(hub: str, pair: Pair) -> None:
    with pair.unchanged(), Raw(hub) as stranger:
        for _ in range(3000):  # more answers than the sockets hold
            stranger.send(b"\xc1")


def test_the_good_worker_hears_of_a_refusal_when_it_waits(pair: Pair) -> None:
    """What a raw peer gets as a message, a worker gets as an error."""
    with pytest.raises(ProtocolError, match="no bucket"):
        pair.worker.read("weights", 77)
    pair.finish_round()
