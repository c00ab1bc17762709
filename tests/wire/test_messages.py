"""Messages: each one travels whole, and nothing but a well-formed one gets through."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zps.errors import ProtocolError
from zps.wire import messages as m

SESSIONED = {"epoch": 1 << 61, "session": 3, "seq": 3 << 32}
SETTINGS = {"mode": "ssp", "staleness": 2, "quorum": 1.0, "world_size": None}
AT = m.SegmentAt(pid=17, fd=5, nbytes=1 << 40)
EXAMPLES: list[m.Message] = [
    m.Hello(
        protocol=1, job="häuslich", rank=None, world_size=4, incarnation="ab", host="h/1", pid=9,
        settings=SETTINGS,
    ),
    m.Declare(**SESSIONED, layout_hash="0" * 64, rule="torch.optim.NAdam", hub=1, hubs=2),
    m.Enter(**SESSIONED, round=12),
    m.Publish(**SESSIONED),
    m.Push(
        **SESSIONED, round=7, buckets=[0, 5], bases=[7, 6], samples=32.0, grad_scale=65536.0,
        finite=True, hold=False, hypers=True, absent=False,
    ),
    m.Data(**SESSIONED, push=3 << 32, bucket=5),
    m.Pull(**SESSIONED, buckets=[1, 2], whole=True),
    m.Verdict(**SESSIONED, round=7, norm_sq=2.5, finite=True),
    m.Read(**SESSIONED, what="state", field="exp_avg", index=4),
    m.Write(**SESSIONED, what="foreign", field="", index=0),
    m.SetSteps(**SESSIONED),
    m.Barrier(**SESSIONED),
    m.Stats(**SESSIONED),
    m.Bye(**SESSIONED, failed=True),
    m.Probe(seq=3, back=1 << 20),
    m.Probed(seq=3, host="h/1"),
    AT,
    m.Welcome(
        protocol=1, epoch=1, session=2, rank=3, world_size=4, pid=5, host="h/1", settings=SETTINGS
    ),
    m.Attach(
        seq=1, control=AT, weights=AT, slots=AT, bell=AT, doorway=5, first_round=9, formed=True
    ),
    m.Attach(
        seq=1, control=None, weights=None, slots=None, bell=None, doorway=None, first_round=0,
        formed=False,
    ),
    m.Partial(round=7, norm_sq=0.0, finite=False),
    m.Ok(seq=1),
    m.Fetch(push=3 << 32, buckets=[0, 5]),
    m.Consumed(push=3 << 32, buckets=[0, 5], outcomes=[0, 2]),
    m.Weights(bucket=5, version=8, closed=9, over=8, push=None, outcome=0, coded=False),
    m.Refuse(seq=None, code="layout", text="é" * 700),
    m.Closing(text="the hub was stopped"),
]  # fmt: skip
TRAVELLERS = [example for example in EXAMPLES if example is not AT]  # a part of an ATTACH


def fields_of(message: m.Message, **changes: Any) -> bytes:
    """A header like `message`, bent: ... leaves a field out."""
    fields = {"t": message.tag, **message.model_dump(), **changes}
    return msgpack.packb({name: value for name, value in fields.items() if value is not ...})


def example(tag: str) -> m.Message:
    return next(message for message in EXAMPLES if message.tag == tag)


PUSH, HELLO = example("push"), example("hello")


@pytest.mark.parametrize("message", TRAVELLERS, ids=lambda message: message.tag)
def test_a_message_travels_whole(message):
    assert m.decode(m.encode(message)) == message
    assert m.decode(memoryview(m.encode(message))) == message


def test_there_is_an_example_of_every_message():
    def all_of(cls: type) -> set[type]:
        return {cls, *(kind for child in cls.__subclasses__() for kind in all_of(child))}

    kinds = all_of(m.Message) - {m.Message, m.Sessioned}
    assert {type(message) for message in EXAMPLES} == kinds


def test_the_longest_push_fits_into_a_header():
    count = m.MAX_PUSH_BUCKETS
    push = m.Push(**{**PUSH.model_dump(), "buckets": [2**16 - 1] * count, "bases": [2**32] * count})
    assert m.decode(m.encode(push)) == push


def test_a_message_over_the_limit_does_not_leave():
    with pytest.raises(ProtocolError, match="over the limit of 4096"):
        m.encode(m.Refuse(seq=1, code="x", text="é" * 2500))


HOSTILE = {
    "nothing": b"",
    "a number": msgpack.packb(7),
    "a list": msgpack.packb(["push"]),
    "half a message": fields_of(PUSH)[:-1],
    "something behind it": fields_of(PUSH) + b"\x00",
    "over 4 KiB": fields_of(HELLO, job="x" * 5000),
    "no tag": msgpack.packb({"seq": 1}),
    "an unknown tag": fields_of(PUSH, t="van"),
    "a tag that is no text": fields_of(PUSH, t=3),
    "a tag that is a list": fields_of(PUSH, t=["push"]),
    "a segment on its own": fields_of(AT),
    "a base class": fields_of(example("stats"), t="sessioned"),
    "an unknown field": fields_of(PUSH, colour="red"),
    "a missing field": fields_of(PUSH, round=...),
    "a field repeated": b"\x83\xa1t\xa2ok\xa3seq\x01\xa3seq\x02",
    "a key that is a number": b"\x82\xa1t\xa2ok\x01\x01",
    "a key that is bytes": b"\x82\xa1t\xa2ok\xc4\x03seq\x01",
    "an extension type": b"\x82\xa1t\xa2ok\xa3seq\xd4\x05\x00",
    "a timestamp": b"\x82\xa1t\xa2ok\xa3seq\xd6\xff\x00\x00\x00\x00",
    "bad UTF-8": b"\x82\xa1t\xa2ok\xa3seq\xa2\xff\xfe",
    "a boolean for an integer": fields_of(PUSH, round=True),
    "an integer for a boolean": fields_of(PUSH, finite=1),
    "a float for an integer": fields_of(PUSH, round=7.0),
    "text for an integer": fields_of(PUSH, round="7"),
    "a boolean for a number": fields_of(PUSH, samples=True),
    "a boolean in a list": fields_of(PUSH, buckets=[True]),
    "a boolean for a setting": fields_of(HELLO, settings={"staleness": True}),
    "a list for a setting": fields_of(HELLO, settings={"mode": []}),
    "NaN for a setting": fields_of(HELLO, settings={"dc_lambda": float("nan")}),
    "NaN": fields_of(PUSH, samples=float("nan")),
    "infinity": fields_of(PUSH, grad_scale=float("inf")),
    "a negative round": fields_of(PUSH, round=-1),
    "a round beyond all rounds": fields_of(PUSH, round=1 << 48),
    "a sequence number that leaves no room for its outcome": fields_of(PUSH, seq=1 << 60),
    "an integer of 64 bits": fields_of(PUSH, epoch=(1 << 64) - 1),
    "a process number of 32 bits": fields_of(HELLO, pid=(1 << 32) - 1),
    "process number 0": fields_of(HELLO, pid=0),
    "a world that costs memory": fields_of(HELLO, world_size=(1 << 32) - 1),
    "a name that is too long": fields_of(HELLO, incarnation="x" * 257),
    "a state that cannot be read": fields_of(example("read"), what="secrets"),
    "masters, which cannot be written": fields_of(example("write"), what="weights"),
    "a list of over 512": fields_of(PUSH, buckets=[0] * 600),
    "a map of over 512": fields_of(PUSH, bases={f"{i:x}": 0 for i in range(600)}),
    "a list that promises 4 billion": b"\x82\xa1t\xa4push\xa7buckets\xdd\xff\xff\xff\xff",
    "a map that promises 4 billion": b"\xdf\xff\xff\xff\xff\xa1t",
    "text that promises 4 GB": b"\x82\xa1t\xa4push\xa5round\xdb\xff\xff\xff\xff",
    "many empty maps": fields_of(PUSH, buckets=[{}] * 500),
    "many empty lists": fields_of(PUSH, buckets=[[]] * 500),
    "nesting 1000 deep": b"\x82\xa1t\xa4push\xa5round" + b"\x91" * 1000 + b"\x00",
    "maps 1000 deep": b"\x82\xa1t\xa4push\xa5round" + b"\x81\xa1a" * 1000 + b"\x00",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_header_is_a_protocol_error_and_nothing_else(name):
    with pytest.raises(ProtocolError) as caught:
        m.decode(HOSTILE[name])
    assert str(caught.value)
    m.encode(m.Refuse(seq=None, code="ProtocolError", text=str(caught.value)[:700]))


def test_each_bad_header_is_bad_in_one_way_only():
    assert m.decode(fields_of(PUSH)) == PUSH
    assert m.decode(fields_of(HELLO)) == HELLO
    assert m.decode(b"\x82\xa1t\xa2ok\xa3seq\x01") == m.Ok(seq=1)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_header_costs_no_memory(name):
    with pytest.raises(ProtocolError):
        m.decode(HOSTILE[name])  # what is made once, as pydantic's messages
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            m.decode(HOSTILE[name])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 256 << 10


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_a_protocol_error(data):
    with pytest.raises(ProtocolError):
        m.decode(data)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats()
    | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(TRAVELLERS), st.data())
def test_a_field_of_any_value_is_taken_or_refused(message, data):
    name = data.draw(st.sampled_from(["t", *type(message).model_fields]))
    value = data.draw(PLAIN)
    try:
        decoded = m.decode(fields_of(message, **{name: value}))
    except ProtocolError:
        return
    assert m.decode(m.encode(decoded)) == decoded


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(TRAVELLERS), st.data())
def test_a_header_with_a_bit_flipped_is_taken_or_refused(message, data):
    frame = bytearray(m.encode(message))
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[bit // 8] ^= 1 << bit % 8
    try:
        decoded = m.decode(bytes(frame))
    except ProtocolError:
        return
    assert m.decode(m.encode(decoded)) == decoded
