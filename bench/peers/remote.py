"""Participants of bench.wire: one worker and its hub on two hosts, each with codecs of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

from ..netns import Host
from . import encoded
from .base import BenchError, Seat, Server
from .team import Team
from .zps_round import ZpsTcp, free_port, start_hub

_FRAME_BYTES, _LARGE_FRAME_BYTES = 2, 9  # what ZMTP puts before a frame
_SMALL = 255
_PACKET_BYTES = 14 + 20 + 32  # Ethernet, IP and TCP with time stamps, as the counters see them


class Remote(ZpsTcp):
    """Nothing is encoded."""

    name: ClassVar[str] = "none"
    about: ClassVar[str] = "gradients and weights as they are"
    push_codec: ClassVar[str] = "none"
    pull_codec: ClassVar[str] = "none"

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """Of the hub; its workers take them over."""
        return {"compression": cls.push_codec, "pull_compression": cls.pull_codec}


class RemoteInt8(Remote):
    name = "zps-int8"
    about = "int8 both ways"
    push_codec = pull_codec = "int8"


class RemoteOnebit(Remote):
    name = "zps-onebit-int8"
    about = "gradients in one bit, weights in int8"
    push_codec, pull_codec = "onebit", "int8"


class RemoteFp16(Remote):
    name = "zps-fp16"
    about = "fp16 both ways"
    push_codec = pull_codec = "fp16"


class Unsupported(BenchError):
    """The hub refuses these settings; the text is its own."""


@contextmanager
def hub_on(host: Host, world: int, **settings: Any) -> Iterator[Server]:
    """A hub that listens at the host's address. Raises Unsupported with the hub's reason."""
    from zps.errors import ConfigError, HubUnreachable

    with ExitStack() as stack:
        try:
            with host.entered():
                bind = f"tcp://{host.address}:{free_port(host.address)}"
                # Its warning that nothing is encrypted is meant for other networks.
                hub = start_hub(world, bind, insecure=True, log_level="error", **settings)
                server = stack.enter_context(hub)
        except (ConfigError, HubUnreachable) as error:
            raise Unsupported(str(error)) from None
        yield server


@contextmanager
def remote_team(
    peer: type[Remote], hub: Host, workers: Host, size: int, seed: int
) -> Iterator[Team]:
    """One worker on one host, set up for its first round with its hub on the other.

    Raises Unsupported with the hub's reason.
    """
    with ExitStack() as stack:
        server = stack.enter_context(hub_on(hub, 1, **peer.settings()))
        with workers.entered():
            seat = Seat(0, 1, size, seed, server.address)
            made = Team(peer, [seat], server, fresh=True)
        stack.callback(made.kill)
        made.ready()
        yield made
        made.close()


def round_bytes(peer: type[Remote], size: int) -> tuple[int, int]:
    """(to the hub, from the hub): payloads and headers of a round, without those of packets."""
    from zps.config import Settings
    from zps.core.layout import Layout, Param
    from zps.wire import messages as m

    layout = Layout.build(
        [Param("w", (size,), "float32")], bucket_bytes=Settings.load().bucket_bytes
    )
    buckets = [bucket.index for bucket in layout.buckets]
    session: dict[str, Any] = {"epoch": 1 << 62, "session": 1, "seq": 1 << 32}
    push = m.Push(
        **session,
        round=1,
        buckets=buckets,
        bases=buckets,
        samples=1.0,
        grad_scale=1.0,
        finite=True,
        hold=False,
        hypers=False,
        absent=False,
    )
    data = m.Data(**session, push=1 << 32, bucket=0)
    weights = m.Weights(bucket=0, version=1, closed=1, push=1 << 32, outcome=0, coded=True)
    fetch = m.Fetch(push=1 << 32, buckets=[0])
    up = _framed(len(m.encode(push)))
    down = 0
    for piece in layout.pieces:
        up += _framed(len(m.encode(data)))
        up += _framed(encoded.encoded_bytes(peer.push_codec, piece.count))
        down += _framed(len(m.encode(fetch))) + _framed(len(m.encode(weights))) + _framed(8)
        down += _framed(encoded.encoded_bytes(peer.pull_codec, piece.count))
    return up, down


def packet_bytes(packets: int) -> int:
    """What the network's own headers take, in as many packets as it was handed."""
    return _PACKET_BYTES * packets


def _framed(nbytes: int) -> int:
    return nbytes + (_FRAME_BYTES if nbytes <= _SMALL else _LARGE_FRAME_BYTES)
