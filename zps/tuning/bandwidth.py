"""The way to the hub, measured: with PROBE messages, which change nothing there, or in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import median

import torch
import zmq

from zps.config import Settings
from zps.errors import HubLost, ProtocolError, Rejected, WaitTimeout
from zps.hub.process import HubProcess
from zps.tuning.cost import Link, Rates
from zps.wire import messages as m
from zps.wire.sockets import Dealer, host_id
from zps.worker.worker import Worker

__all__ = ["Prober", "measure_link", "probe", "rate"]

#: The first volume that is sent, and the most; in between the one that is timed is looked for.
_LEAST_BYTES, _MOST_BYTES = 64 << 10, 64 << 20
_GROWTH = 4
#: A volume that takes so long is timed: the clock and the start of a transfer do not matter then.
_LONG_S = 0.1
_REPEATS = 5
#: Probes on their way to one hub: it always has the next one, and holds few.
_WINDOW = 8

_SHARED_BYTES = 16 << 20
_MAX_ANSWER_BYTES = 2 * m.MAX_PROBE_BYTES


def measure_link(settings: Settings) -> Link:
    """The link that a job with these settings has, and how fast it is.

    With hubs in the settings, the way to them, all at once; a worker on such a hub's host shares
    its memory unless `link` is "message". Without, a hub is started, measured and ended.
    Raises HubUnreachable, WaitTimeout, HubLost, and Rejected by a hub that has workers.
    """
    if settings.hubs:
        rates, here = probe(settings.hubs, settings.connect_timeout_s)
        shared = here and settings.link != "message"
        if shared:
            how = f"{rates.how}; workers on this host share its memory, unless ZPS_LINK=message"
            rates = replace(rates, how=how)
        return Link(None if shared else rates.to_hub, rates)
    if settings.link == "message":
        with _own_hub(settings) as address:
            rates, _ = probe([address], settings.connect_timeout_s)
        rates = replace(rates, how="measured with messages to a hub started for it")
        return Link(rates.to_hub, rates)
    return Link(None, _shared(settings))


def probe(addresses: Sequence[str], timeout_s: float) -> tuple[Rates, bool]:
    """Bytes a second to and from these hubs together, and whether all are on this host.

    timeout_s  the longest that a hub may say nothing. Raises as `measure_link`.
    """
    with Prober(addresses, timeout_s) as prober:
        empty_s = min(prober.volley(0, back=False) for _ in range(_REPEATS))
        to_hub, from_hub = (
            len(addresses) * rate(partial(prober.volley, back=back), empty_s)
            for back in (False, True)
        )
        how = f"measured with messages to {' and '.join(addresses)}"
        return Rates(to_hub, from_hub, how), prober.here


class Prober:
    """Sockets to hubs that are asked nothing but to take bytes, or to give some."""

    def __init__(self, addresses: Sequence[str], timeout_s: float) -> None:
        """Reach every hub. Raises HubUnreachable, WaitTimeout, Rejected."""
        self.here = True
        self._timeout_s = timeout_s
        self._seq = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._dealers = [Dealer(self._context, address, _MAX_ANSWER_BYTES) for address in addresses]
        try:
            for dealer in self._dealers:
                dealer.send([m.encode(m.Probe(seq=0, back=0))], timeout_s)
                self._take(dealer, timeout_s)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Prober:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def volley(self, nbytes: int, *, back: bool) -> float:
        """Seconds until each hub has taken so many bytes, or all have come from it."""
        sizes = [m.MAX_PROBE_BYTES] * (nbytes // m.MAX_PROBE_BYTES)
        sizes += [rest] if (rest := nbytes % m.MAX_PROBE_BYTES) or not nbytes else []
        payload = memoryview(bytes(max(sizes)))
        begin = time.perf_counter()
        sent = dict.fromkeys(self._dealers, 0)
        taken = dict.fromkeys(self._dealers, 0)
        while waited_for := [d for d in self._dealers if taken[d] < len(sizes)]:
            for dealer in waited_for:
                room = min(len(sizes), taken[dealer] + _WINDOW)
                while sent[dealer] < room and self._send(
                    dealer, sizes[sent[dealer]], payload, back
                ):
                    sent[dealer] += 1
            for dealer in self._answered(waited_for):
                self._take(dealer, 0.0)
                taken[dealer] += 1
        return time.perf_counter() - begin

    def close(self) -> None:
        for dealer in self._dealers:
            dealer.close()
        self._context.term()

    def _send(self, dealer: Dealer, nbytes: int, payload: memoryview, back: bool) -> bool:
        self._seq += 1
        header = m.encode(m.Probe(seq=self._seq, back=nbytes if back else 0))
        return dealer.try_send([header] if back or not nbytes else [header, payload[:nbytes]])

    def _answered(self, dealers: Sequence[Dealer]) -> list[Dealer]:
        """Those of `dealers` from which something has come. Raises WaitTimeout, HubLost."""
        poller = zmq.Poller()
        for dealer in dealers:
            poller.register(dealer.socket, zmq.POLLIN)
            poller.register(dealer.monitor, zmq.POLLIN)
        ready = dict(poller.poll(int(self._timeout_s * 1000)))
        for dealer in dealers:
            if dealer.socket not in ready and dealer.is_cut():
                raise HubLost(f"the connection to the hub at {dealer.address} has ended")
        if not ready:
            raise self._silent(dealers[0])
        return [dealer for dealer in dealers if dealer.socket in ready]

    def _take(self, dealer: Dealer, timeout_s: float) -> None:
        frames = dealer.receive(timeout_s)
        if frames is None:
            raise self._silent(dealer)
        answer = m.decode(frames[0])
        if isinstance(answer, m.Refuse):
            raise Rejected(
                f"the hub at {dealer.address} does not let itself be measured: {answer.text}. "
                "Measure when no job is there, or say how fast the link is with --bandwidth",
                code=answer.code,
            )
        if not isinstance(answer, m.Probed):
            raise ProtocolError(f"a probe was answered with {answer.tag}")
        self.here = self.here and answer.host == host_id()

    def _silent(self, dealer: Dealer) -> WaitTimeout:
        return WaitTimeout(
            f"the hub at {dealer.address} did not answer a probe in {self._timeout_s:g} s"
        )


def rate(volley: Callable[[int], float], empty_s: float) -> float:
    """Bytes a second, from the least volume of those tried that takes long enough to be timed.

    volley   the seconds that so many bytes take
    empty_s  how long nothing takes, which is left out
    """
    nbytes = _LEAST_BYTES
    while volley(nbytes) < _LONG_S and nbytes < _MOST_BYTES:
        nbytes *= _GROWTH
    taken_s = median(volley(nbytes) for _ in range(_REPEATS))
    return nbytes / max(taken_s - empty_s, taken_s / 2)  # `empty_s` may have been held up


def _shared(settings: Settings) -> Rates:
    """Of a worker beside a hub of its own: a gradient until it is applied, weights copied out."""
    gradient = {"w": torch.ones(_SHARED_BYTES // 4)}
    with _own_hub(settings) as address, Worker(address, settings=_alone(settings)) as worker:
        worker.declare(gradient, "assign")
        pushed_s = _typical_s(lambda: worker.push(gradient).wait())
        copied_s = _typical_s(lambda: worker.weights("w").clone())
    how = f"measured with {_SHARED_BYTES >> 20} MiB in the shared memory of a hub started for it"
    return Rates(_SHARED_BYTES / pushed_s, _SHARED_BYTES / copied_s, how)


def _typical_s(call: Callable[[], object]) -> float:
    call()  # its memory is there from now on
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return median(times)


@contextmanager
def _own_hub(settings: Settings) -> Iterator[str]:
    """The address of a hub that is there for this."""
    hub = HubProcess.start(_alone(settings))
    try:
        yield hub.address
    finally:
        hub.stop()


def _alone(settings: Settings) -> Settings:
    """What matters of the settings to one worker that pushes plain gradients in step."""
    names = ("link", "bucket_bytes", "hub_threads", "spin_us", "runtime_dir", "connect_timeout_s")
    chosen = {name: getattr(settings, name) for name in names}
    return Settings(rank=0, world_size=1, log_level="warning", **chosen)
