"""The way to the hub, measured: which way it is, what is said of it, and when it cannot be."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zmq

from tests.ports import free_port
from tests.workers import Crew
from zps import Settings, Worker
from zps.errors import HubUnreachable, Rejected, WaitTimeout
from zps.hub.process import HubProcess
from zps.tuning.bandwidth import Prober, measure_link, probe, rate
from zps.wire import messages as m
from zps.wire.sockets import Router


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return Settings(runtime_dir=tmp_path / "run", connect_timeout_s=20)


@pytest.fixture
def hubs(settings: Settings) -> Iterator[list[HubProcess]]:
    """Two hubs that listen on tcp, and that nobody works with."""
    started = []
    try:
        for _ in range(2):
            bind = f"tcp://127.0.0.1:{free_port()}"
            started.append(HubProcess.start(settings, bind=bind))
        yield started
    finally:
        for hub in started:
            hub.stop()


@pytest.mark.parametrize("bytes_s", [1e4, 1.25e8, 4e9])
def test_a_rate_is_that_of_what_takes_time_without_what_nothing_takes(bytes_s: float) -> None:
    empty_s = 0.002
    assert rate(lambda nbytes: empty_s + nbytes / bytes_s, empty_s) == pytest.approx(bytes_s)


def test_what_takes_long_is_not_tried_with_more() -> None:
    tried = []

    def volley(nbytes: int) -> float:
        tried.append(nbytes)
        return nbytes / 1e6

    rate(volley, 0.0)
    assert max(tried) / 1e6 < 0.5


def test_the_link_to_a_hub_is_measured_each_way_with_messages(
    settings: Settings, hubs: list[HubProcess]
) -> None:
    address = hubs[0].address
    link = measure_link(settings.replace(hub=address, link="message"))
    assert link.measured is not None
    assert link.bandwidth == link.measured.to_hub > 1e6
    assert link.measured.from_hub > 1e6
    assert link.measured.how == f"measured with messages to {address}"
    assert str(link).endswith("bit/s (measured)")
    with Worker(address, world_size=3) as first:  # the first worker still says how many there are
        assert first.stats()["live"] == [0]
        assert first.world_size == 3


def test_several_hubs_are_measured_together(settings: Settings, hubs: list[HubProcess]) -> None:
    addresses = ",".join(hub.address for hub in hubs)
    link = measure_link(settings.replace(hub=addresses, link="message"))
    assert link.measured is not None
    assert link.measured.how.endswith(f"{hubs[0].address} and {hubs[1].address}")


def test_a_volley_is_taken_whole_by_every_hub(tmp_path: Path) -> None:
    addresses = [f"ipc://{tmp_path}/{name}" for name in "ab"]
    took = dict.fromkeys(addresses, 0)
    sizes, over = 3 * m.MAX_PROBE_BYTES + 5, threading.Event()

    def serve(address: str) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        router = Router(context, address, 1 << 22)
        for _ in range(1 + 4):  # the first contact, then the volley
            assert router.socket.poll(20_000)
            frames = router.receive()
            assert frames is not None
            message = m.decode(frames[1])
            assert isinstance(message, m.Probe)
            took[address] += sum(len(frame) for frame in frames[2:])
            router.send(frames[0], [m.encode(m.Probed(seq=message.seq, host="elsewhere"))])
        over.wait(20)
        router.close()
        context.term()

    threads = [threading.Thread(target=serve, args=(address,)) for address in addresses]
    for thread in threads:
        thread.start()
    with Prober(addresses, 20.0) as prober:
        prober.volley(sizes, back=False)
        assert not prober.here
    over.set()
    for thread in threads:
        thread.join()
    assert took == dict.fromkeys(addresses, sizes)


def test_workers_beside_a_hub_share_its_memory(settings: Settings, hubs: list[HubProcess]) -> None:
    link = measure_link(settings.replace(hub=hubs[0].address))
    assert link.bandwidth is None
    assert str(link) == "shared memory"
    assert "workers on this host share its memory, unless ZPS_LINK=message" in str(link.measured)


@pytest.mark.parametrize(
    ("way", "said"), [("auto", "shared memory of a hub"), ("message", "messages to a hub")]
)
def test_without_a_hub_one_is_started_and_measured(settings: Settings, way: str, said: str) -> None:
    link = measure_link(settings.replace(link=way))
    assert link.measured is not None
    assert f"{said} started for it" in link.measured.how
    assert link.bandwidth == (link.measured.to_hub if way == "message" else None)
    assert min(link.measured.to_hub, link.measured.from_hub) > 1e6
    assert list((settings.runtime_dir).iterdir()) == []  # it has gone


def test_a_hub_that_is_not_there_is_an_error_in_time(settings: Settings) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(HubUnreachable, match=f"at {address} for 0.3 s"):
        measure_link(settings.replace(hub=address, connect_timeout_s=0.3))


def test_a_hub_that_does_not_answer_is_an_error_in_time(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = Router(context, f"ipc://{tmp_path}/s", 1 << 20)
    with pytest.raises(WaitTimeout, match=r"did not answer a probe in 0.3 s"):
        probe([f"ipc://{tmp_path}/s"], 0.3)
    router.close()
    context.term()


def test_a_hub_with_workers_is_left_in_peace(crew: Crew, settings: Settings) -> None:
    hub = crew.hub().address
    with Worker(hub, rank=0, world_size=1) as worker:
        worker.declare({"w": torch.zeros(3)})
        before = worker.stats()
        with pytest.raises(Rejected, match=r"work here, ranks \[0\].*--bandwidth") as refused:
            measure_link(settings.replace(hub=hub))
        assert refused.value.code == "busy"
        assert worker.stats() == before
