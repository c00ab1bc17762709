"""Addresses of hubs: what can be read, and which part of what cannot."""

from __future__ import annotations

import pytest

from zps.core.address import parse, split
from zps.errors import ConfigError


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("ipc:///run/zps/1/s", ("ipc", "/run/zps/1/s")),
        ("ipc:///home/a b/s", ("ipc", "/home/a b/s")),
        ("tcp://127.0.0.1:5555", ("tcp", "127.0.0.1:5555")),
        ("tcp://node-3.cluster:1", ("tcp", "node-3.cluster:1")),
        ("tcp://[::1]:65535", ("tcp", "[::1]:65535")),
        ("tcp://*:5555", ("tcp", "*:5555")),
    ],
)
def test_an_address_is_split_into_scheme_and_rest(address: str, parts: tuple[str, str]) -> None:
    assert parse(address) == parts


WRONG = {
    "": "neither ipc:// nor tcp://",
    "localhost:5555": "neither ipc:// nor tcp://",
    "udp://host:5555": "neither ipc:// nor tcp://",
    "inproc://x": "neither ipc:// nor tcp://",
    "ipc:/one/slash": "neither ipc:// nor tcp://",
    "TCP://host:5555": "neither ipc:// nor tcp://",
    "ipc://relative/s": "the path 'relative/s' does not begin with /",
    "ipc:// /run/s": "the path ' /run/s' does not begin with /",
    "ipc://": "the path '' does not begin with /",
    "tcp://": "it has no port",
    "tcp://host": "it has no port",
    "tcp://[::1]": "it has no port",
    "tcp://:5555": "its host is empty",
    "tcp://host:": "the port '' is no number from 1 to 65535",
    "tcp://host:0": "the port '0' is no number from 1 to 65535",
    "tcp://host:65536": "the port '65536' is no number",
    "tcp://host:00000123456": "the port '00000123456' is no number",
    "tcp://host:-1": "the port '-1' is no number",
    "tcp://host:http": "the port 'http' is no number",
    "tcp://host:5555/": "the port '5555/' is no number",
    "tcp://host:\u0665\u0665": "is no number from 1 to 65535",
    "tcp://host :5555": "there is a blank in it",
    "tcp://host: 5555": "there is a blank in it",
    "tcp:// host:5555": "there is a blank in it",
    "tcp://a:1 tcp://b:2": "it is two addresses",
    "ipc:///a ipc:///b": "it is two addresses",
    "tcp://::1:5555": "the host '::1' has a colon in it; an IPv6 host is in brackets",
    "tcp://a:1:2": "the host 'a:1' has a colon in it",
}


@pytest.mark.parametrize("address", WRONG)
def test_what_cannot_be_read_is_refused_with_the_part_that_is_wrong(address: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(address)
    text = str(refused.value)
    assert repr(address) in text
    assert WRONG[address] in text
    assert "write ipc:///path/to/socket or tcp://host:port" in text


def test_a_path_has_107_bytes_at_most() -> None:
    longest = "/" + "x" * 106
    assert parse(f"ipc://{longest}") == ("ipc", longest)
    with pytest.raises(ConfigError, match="has 108 bytes; the system allows 107.*ZPS_RUNTIME_DIR"):
        parse(f"ipc://{longest}x")
    with pytest.raises(ConfigError, match="has 109 bytes"):
        parse("ipc:///" + "é" * 54)  # bytes, not characters


def test_a_list_is_split_at_commas_with_blanks_beside_them() -> None:
    assert split("tcp://a:1") == ("tcp://a:1",)
    assert split(" tcp://a:1 ,ipc:///b, tcp://c:3\n") == ("tcp://a:1", "ipc:///b", "tcp://c:3")


@pytest.mark.parametrize(
    ("text", "which"),
    [
        (" ", "address 1 of 1"),
        (",tcp://a:1", "address 1 of 2"),
        ("tcp://a:1,", "address 2 of 2"),
        ("tcp://a:1,,tcp://b:2", "address 2 of 3"),
        ("tcp://a:1, ,tcp://b:2", "address 2 of 3"),
    ],
)
def test_a_place_without_an_address_is_refused(text: str, which: str) -> None:
    with pytest.raises(ConfigError, match=f"{which} is empty"):
        split(text)


def test_one_wrong_address_spoils_a_list_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'tcp://b:x' cannot be read: the port 'x'"):
        split("tcp://a:1,tcp://b:x,tcp://c:3")
