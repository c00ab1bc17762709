"""Members, strangers and floods: the hub says no, nothing changes, the job goes on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
import zmq

from tests.hub.pair import LR, SHAPES, Pair, hypers
from tests.hub.raw import Raw
from zps.errors import ProtocolError
from zps.wire import messages as m

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
    "a frame that was not announced": (push(b"x"), "ProtocolError", "shares its memory"),
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
    "an entry at another round": (request("enter", round=70), "ProtocolError", "round 70, not 0"),
    "a sum of squares below zero": (
        request("verdict", round=1, norm_sq=-1.0, finite=True),
        "ProtocolError",
        "norm_sq",
    ),
    "a sum of squares that is no number": (
        request("verdict", round=1, norm_sq=float("nan"), finite=True),
        "ProtocolError",
        "norm_sq",
    ),
    "what a hub says": (
        lambda raw: ({"t": "partial", "round": 1, "norm_sq": 1.0, "finite": True},),
        "ProtocolError",
        "a partial message is for workers",
    ),
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
        lambda raw: (raw.hello(rank=0, world_size=2),),
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
        pair.raw.send(*pair.raw.declaration(SHAPES, "sgd", {"lr": LR}))
        attach = pair.raw.expect(m.Attach)
        assert attach.formed
        assert attach.slots == pair.attach.slots


@pytest.mark.parametrize(
    ("hypers", "shared", "text"),
    [
        ({"lr": 7.0}, True, "has declared other hyperparameters"),
        ({"lr": LR}, False, "is at work over shared memory"),
    ],
)
def test_a_member_cannot_declare_something_else(pair: Pair, hypers, shared, text) -> None:
    with pair.unchanged():
        other = pair.raw.declaration(SHAPES, "sgd", hypers, shared=shared)
        refusal = pair.raw.refused(*other)
        assert refusal.code == "declared"
        assert text in refusal.text


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
        stranger.send(stranger.hello(), bytes(20 << 20))
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
        pair.worker.channels[0].read("weights", 77)
    pair.finish_round()
