"""Hellos and declarations that do not fit: refused with the reason, and a good one follows."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hub.pair import SHAPES, Pair, hypers
from tests.hub.raw import JOB, Raw
from tests.workers import Crew
from zps.core.layout import Layout
from zps.wire import messages as m
from zps.wire import packing

# --- hellos -------------------------------------------------------------------------------------


def test_a_hello_that_comes_again_is_answered_with_the_same_session(hub: str, raw: Raw) -> None:
    hello = raw.hello()
    raw.send(hello)
    first = raw.expect(m.Welcome)
    raw.send(hello)
    assert raw.expect(m.Welcome) == first
    raw.epoch, raw.session, raw.seq = first.epoch, first.session, first.session << 32


def test_a_hello_overheard_does_not_give_the_session_away(hub: str, raw: Raw) -> None:
    hello = raw.hello(world_size=2)
    raw.send(hello)
    welcome = raw.expect(m.Welcome)
    raw.epoch, raw.session, raw.seq = welcome.epoch, welcome.session, welcome.session << 32
    with Raw(hub) as thief:
        assert thief.refused(hello).code == "duplicate_hello"
    assert raw.stats()["live"] == [0]


HELLOS: dict[str, tuple[dict[str, Any], str, str]] = {
    "another protocol": ({"protocol": 2}, "protocol", "the hub speaks protocol 1, the worker 2"),
    "another job": ({"job": "other"}, "job", "serves job 'hostile', not 'other'"),
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
        refusal = stranger.refused(stranger.hello(**{"world_size": 2, **changes}))
        assert refusal.code == code
        assert text in refusal.text


def test_a_process_that_is_not_there_cannot_join(hub: str, raw: Raw) -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    for pid in (done.pid, (1 << 31) - 1):
        assert raw.refused(raw.hello(pid=pid)).code == "gone"
    assert raw.refused(raw.hello(pid=(1 << 32) - 1)).code == "ProtocolError"
    raw.greet()  # the rank is as free as before
    assert raw.stats()["live"] == [0]


def test_a_world_of_billions_costs_nothing(hub: str, raw: Raw) -> None:
    assert raw.refused(raw.hello(world_size=(1 << 32) - 1)).code == "ProtocolError"
    raw.greet(world_size=1 << 16)
    assert raw.stats()["world_size"] == 1 << 16


# --- too early ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["publish", "set_steps"])
def test_what_needs_a_declaration_is_refused_before_it(hub: str, raw: Raw, tag: str) -> None:
    raw.greet()
    for header in (
        raw.push(),
        raw.header(tag),
        raw.header("read", what="weights", field="", index=0),
    ):
        refusal = raw.refused(header)
        assert refusal.code == "not_declared"
        assert "rank 0 has not declared its parameters" in refusal.text
    assert raw.stats()["versions"] == 0


def test_a_push_before_the_first_weights_is_refused(hub: str, raw: Raw) -> None:
    raw.greet()
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
    return header, packing.pack(wire), hypers({"params": list(range(len(params)))})


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
    raw.greet()
    refusal = raw.refused(*bad(raw))
    assert refusal.code == code
    assert text in refusal.text
    raw.send(*raw.declaration(SHAPES))
    raw.expect(m.Attach)


def test_what_does_not_fit_into_memory_is_refused_and_leaves_nothing(crew: Crew, raw: Raw) -> None:
    hub = crew.hub(job=JOB)
    raw.greet()
    wire = [1 << 34, True, False, [["a", [1 << 45], "float32"]], []]
    digest = Layout.from_wire(wire).hash
    for _ in range(4):
        header = raw.header("declare", layout_hash=digest, rule="sum")
        refusal = raw.refused(header, packing.pack(wire), hypers({"params": [0]}))
        assert refusal.code == "out_of_memory"
        assert f"{1 << 47:,} bytes, but only" in refusal.text
    for path in Path(f"/proc/{hub.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # an earlier connection has just gone
            assert "memfd:" not in os.readlink(path)


def placed(raw: Raw, **place: int) -> tuple[Any, ...]:
    header, *payload = raw.declaration(SHAPES, "sgd")
    return {**header, **place}, *payload


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
    "other hubs": (
        lambda r: placed(r, hub=1, hubs=2),
        "hubs",
        "this hub is number 2 of 2 on rank 1, but number 1 of 1 on rank 0",
    ),
    "a hub beyond the last": (lambda r: placed(r, hub=2, hubs=2), "ProtocolError", "number 2 of 2"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused_and_the_right_one_may_follow(
    hub: str, raw: Raw, name: str
) -> None:
    bad, code, text = OTHERS[name]
    with Raw(hub) as first:
        first.greet(world_size=2)
        first.send(*first.declaration(SHAPES, "sgd"))
        first.expect(m.Attach)
        raw.greet(rank=1, world_size=2)
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
    raw.greet(rank=1, world_size=2)
    raw.send(*raw.declaration(SHAPES))
    header, *payload = raw.declaration(SHAPES)  # it has asked again: this one counts
    raw.send(header, *payload)
    assert raw.stats()["formed"] is False
    with Raw(hub) as first:
        first.greet(world_size=2)
        first.send(*first.declaration(SHAPES))
        first.expect(m.Attach)
        assert raw.expect(m.Attach).seq == header["seq"]
        assert raw.stats()["live"] == [0, 1]
