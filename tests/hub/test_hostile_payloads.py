"""Encoded gradients in messages: what is not as the plan says is refused, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from tests.hub.raw import Fields, Raw
from tests.integration.replay import Replay
from tests.workers import Crew, at_once
from zps import Worker
from zps.codec.plan import Plan
from zps.codec.spec import Compression
from zps.errors import ConfigError
from zps.wire import messages as m

COMPRESSION = "none; coded=int8; top=topk:ratio=0.01"
JOB = "payloads"
#: A bucket has 4096 bytes: one for `plain`, two each for the others.
SHAPES = {"plain": (8,), "coded": (2000,), "top": (2000,)}
PLAIN, CODED, TOP, REST = 0, 1, 3, 4  # buckets; REST is the shorter one of `top`
LR = 0.5
K = 11  # entries of `top` in a bucket of 1024 elements
K_REST = 10  # and in its other, of 976


class Members:
    """A job of two: rank 0 is a good worker, rank 1 a peer that sends its gradients in messages."""

    def __init__(self, worker: Worker, raw: Raw):
        self.worker = worker
        self.raw = raw
        self.round = 0
        self._replay = Replay(worker.layout, COMPRESSION)
        self.plan = Plan.build(worker.layout, Compression.parse(COMPRESSION))

    def payload(self) -> list[bytes]:
        """Zeros as each bucket's codec has them."""
        return [bytes(int(nbytes)) for nbytes in self.plan.bucket_nbytes]

    def push(self, **changes: Any) -> Fields:
        """The header of an honest push of the round that is next."""
        buckets = changes.get("buckets", range(len(self.plan.bucket_nbytes)))
        fields = {"round": self.round, "buckets": list(buckets), "inline": True}
        return self.raw.push(**{**fields, "bases": [self.round] * len(buckets), **changes})

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: self.worker.weights(name).clone() for name in SHAPES}

    def state(self) -> tuple[dict[str, Any], list[bytes]]:
        return self.worker.stats(), [w.numpy().tobytes() for w in self.weights().values()]

    def finish_round(self, send: Callable[[], object] | None = None) -> None:
        """The good worker pushes ones, the peer zeros: the weights fall by half of what arrives."""
        before, ones = self.weights(), {n: torch.ones(s) for n, s in SHAPES.items()}
        work = self.worker.push(ones)
        if send is None:
            self.raw.send(self.push(), *self.payload())
        else:
            send()
        for _ in self.plan.bucket_nbytes:
            assert self.raw.expect(m.Weights).version == self.round + 1
        work.wait()
        self.round += 1
        for name, grad in self._replay.send(ones).items():
            assert torch.equal(self.worker.weights(name), before[name] - LR * (grad / 2)), name

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """What happens inside has no effect, and the next round is a good one."""
        before = self.state()
        yield
        assert self.state() == before
        self.finish_round()


@pytest.fixture(scope="module")
def hub(crew: Crew) -> str:
    return crew.hub(job=JOB, compression=COMPRESSION, compression_min_bytes=0).address


@pytest.fixture
def members(hub: str) -> Iterator[Members]:
    with ExitStack() as stack:
        raw = stack.enter_context(Raw(hub))
        worker = Worker(hub, rank=0, world_size=2, job=JOB, timeout_s=20)
        stack.enter_context(worker)
        tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        join = {"rank": 1, "world_size": 2, "job": JOB, "shared": False}
        at_once(
            lambda: worker.declare(tensors, "sgd", lr=LR),
            lambda: raw.join(SHAPES, "sgd", hypers={"lr": LR}, **join),
        )
        members = Members(worker, raw)
        members.finish_round()
        yield members


def topk(k: int, *, offsets: Sequence[int], indices: Mapping[int, int] | None = None) -> bytes:
    """A bucket of `top`: entry i is element i but where `indices` says otherwise, all are ones."""
    where = np.arange(k + k % 2, dtype="<u2")
    for entry, index in (indices or {}).items():
        where[entry] = index
    encoded = np.array(offsets, "<u4").tobytes() + where.tobytes() + np.ones(k, "<f4").tobytes()
    return encoded + bytes(-len(encoded) % 64)


Frames = dict[int, bytes]
"""Buckets whose payload is another than zeros."""

NBYTES = {PLAIN: 64, CODED: 1088, TOP: 128}
BAD: dict[str, tuple[Frames, str]] = {
    "a plain gradient too short": ({PLAIN: bytes(60)}, "60 bytes came for bucket 0, which has 64"),
    "an encoded gradient too short": ({CODED: bytes(1087)}, "1087 bytes came for bucket 1"),
    "an encoded gradient too long": ({CODED: bytes(1089)}, "1089 bytes came for bucket 1"),
    "a gradient that is not encoded": ({CODED: bytes(4096)}, "4096 bytes came for bucket 1"),
    "no bytes at all": ({TOP: b""}, "0 bytes came for bucket 3"),
    "more entries than fit": ({TOP: topk(K, offsets=[0, K + 1])}, "'top'"),
    "entries beyond all": ({TOP: topk(K, offsets=[0, 1 << 31])}, "'top'"),
    "offsets that go back": ({TOP: topk(K, offsets=[5, 2])}, "'top'"),
    "entries that begin nowhere": ({TOP: topk(K, offsets=[3, K])}, "'top'"),
    "an element twice": ({TOP: topk(K, offsets=[0, K], indices={4: 3})}, "'top'"),
    "elements in no order": ({TOP: topk(K, offsets=[0, K], indices={4: 900})}, "'top'"),
    "an element of the next tensor": (
        {REST: topk(K_REST, offsets=[0, K_REST], indices={K_REST - 1: 976})},
        "'top'",
    ),
    "an element beyond the tile": (
        {TOP: topk(K, offsets=[0, K], indices={K - 1: 65535})},
        "'top'",
    ),
}


def test_the_plan_says_how_long_payloads_are(members: Members) -> None:
    sizes = {bucket: int(members.plan.bucket_nbytes[bucket]) for bucket in NBYTES}
    assert sizes == NBYTES


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("name", BAD)
def test_a_payload_that_is_not_what_it_should_be_is_refused(
    members: Members, name: str, inline: bool
) -> None:
    bent, text = BAD[name]
    payload = members.payload()
    for bucket, frame in bent.items():
        payload[bucket] = frame
    if inline:
        with members.unchanged():
            refusal = members.raw.refused(members.push(), *payload)
            assert refusal.code == "ProtocolError"
            assert text in refusal.text
        return
    before = members.state()[1]
    raw, push = members.raw, members.push(inline=False)

    def send_the_good_ones_after_the_bad() -> None:
        raw.send(push)
        assert sorted(raw.expect(m.Fetch).buckets) == list(range(len(payload)))
        for bucket in bent:
            refusal = raw.refused(
                raw.header("data", push=push["seq"], bucket=bucket), payload[bucket]
            )
            assert refusal.code == "ProtocolError"
            assert text in refusal.text
            assert members.state()[1] == before
        for bucket, frame in enumerate(members.payload()):
            raw.send(raw.header("data", push=push["seq"], bucket=bucket), frame)

    members.finish_round(send_the_good_ones_after_the_bad)


PUSHES: dict[str, tuple[Callable[[Members], Sequence[Any]], str]] = {
    "a payload too few": (
        lambda o: (o.push(), *o.payload()[1:]),
        "4 payloads came with a push that has 5",
    ),
    "a payload too many": (
        lambda o: (o.push(), *o.payload(), b""),
        "6 payloads came with a push that has 5",
    ),
    "no payload": (lambda o: (o.push(),), "0 payloads came with a push that has 5"),
    "a payload that comes later": (
        lambda o: (o.push(inline=False), *o.payload()),
        "5 payloads came with a push that has 0",
    ),
    "no such bucket": (lambda o: (o.push(buckets=[5]), b""), "this hub has 5"),
    "no such bucket, later": (lambda o: (o.push(buckets=[0, 5], inline=False),), "this hub has 5"),
    "no such bucket, with bytes": (
        lambda o: (o.push(buckets=[5]), bytes(64)),
        "64 bytes came for bucket 5",
    ),
    "bytes of nothing announced": (
        lambda o: (o.raw.header("data", push=o.raw.seq, bucket=0), bytes(64)),
        "bytes of bucket 0 that nobody announced",
    ),
    "bytes of no bucket": (
        lambda o: (o.raw.header("data", push=o.raw.seq, bucket=99), bytes(64)),
        "bytes of bucket 99 that nobody announced",
    ),
}


@pytest.mark.parametrize("name", PUSHES)
def test_a_push_that_no_worker_sends_is_refused(members: Members, name: str) -> None:
    make, text = PUSHES[name]
    with members.unchanged():
        refusal = members.raw.refused(*make(members))
        assert refusal.code == "ProtocolError"
        assert text in refusal.text


def test_bytes_of_another_push_and_bytes_that_come_again_are_refused(members: Members) -> None:
    raw, push, payload = members.raw, members.push(inline=False), members.payload()

    def refused(bucket: int, of: int) -> str:
        return raw.refused(raw.header("data", push=of, bucket=bucket), payload[bucket]).text

    raw.send(push)
    raw.expect(m.Fetch)
    assert "bytes of bucket 3 that nobody announced" in refused(TOP, push["seq"] - 1)
    for bucket, frame in enumerate(payload):
        raw.send(raw.header("data", push=push["seq"], bucket=bucket), frame)
    assert "bytes of bucket 3 that nobody asked for" in refused(TOP, push["seq"])
    members.finish_round(lambda: None)
    assert "bytes of bucket 3 that nobody announced" in refused(TOP, push["seq"])
    with members.unchanged():
        pass


# --- settings -----------------------------------------------------------------------------------

OTHERWISE: dict[str, tuple[dict[str, Any], str]] = {
    "compression": (
        {"compression": "int8"},
        "compression is 'int8' on the worker but 'none; coded=int8; top=topk' on the hub",
    ),
    "no compression": ({"compression": "none"}, "compression is 'none' on the worker but"),
    "small tensors": (
        {"compression_min_bytes": 4096},
        "compression_min_bytes is 4096 on the worker but 0 on the hub",
    ),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_worker_that_would_encode_otherwise_is_refused_at_hello(
    hub: str, members: Members, name: str
) -> None:
    settings, text = OTHERWISE[name]
    with members.unchanged(), Raw(hub) as stranger:
        refusal = stranger.refused(stranger.hello(world_size=2, job=JOB, settings=settings))
        assert refusal.code == "settings"
        assert text in refusal.text
    with members.unchanged(), pytest.raises(ConfigError, match=next(iter(settings))):
        Worker(hub, rank=1, world_size=2, job=JOB, **settings)


UNREADABLE: dict[str, tuple[dict[str, str], str]] = {
    "a codec": ({"compression": "zip9"}, "compression: there is no codec 'zip9'"),
    "a codec of some": (
        {"compression": "none; coded=zip9:level=3; top=topk"},
        "compression: there is no codec 'zip9'",
    ),
    "a codec of weights": (
        {"pull_compression": "zip9"},
        "pull_compression: there is no codec 'zip9'",
    ),
    "an option": ({"compression": "int8:level=9"}, "compression: int8 has no option 'level'"),
    "no grammar": ({"compression": "int8;;"}, "compression: an item is empty"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_compression_that_the_hub_cannot_read_is_refused_at_hello(
    hub: str, members: Members, name: str
) -> None:
    settings, text = UNREADABLE[name]
    with members.unchanged(), Raw(hub) as stranger:
        refusal = stranger.refused(stranger.hello(world_size=2, job=JOB, settings=settings))
        assert refusal.code == "settings"
        assert f"cannot read the worker's {text}" in refusal.text
        assert "Install the same version of zps on both sides" in refusal.text


def test_a_worker_may_write_the_hubs_compression_otherwise(hub: str) -> None:
    text = " none ;coded = int8:block=256;top=topk : ef=true, ratio=1e-2"
    with Worker(hub, rank=0, world_size=1, job=JOB, compression=text) as worker:
        tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        worker.declare(tensors, "mean")
        assert worker.settings.compression == str(Compression.parse(COMPRESSION)) != text
        replay = Replay(worker.layout, COMPRESSION)
        gradients = {n: torch.linspace(-1, 2, s[0]) for n, s in SHAPES.items()}
        for _ in range(2):  # the second has what the first lost
            worker.push(gradients).wait()
            expected = replay.send(gradients)
            assert torch.equal(expected["plain"], gradients["plain"])
            assert not torch.equal(expected["coded"], gradients["coded"])
            assert int(expected["top"].count_nonzero()) == K + K_REST
            for name, tensor in expected.items():
                assert torch.equal(worker.weights(name), tensor), name
