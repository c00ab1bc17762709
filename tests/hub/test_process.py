"""A hub as a process: how it starts, what it says, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from tests.ports import free_port
from tests.workers import ROOT, at_once, together
from zps import Worker
from zps.config import Settings
from zps.errors import ConfigError, HubUnreachable
from zps.hub.process import HubProcess, RuleResolver
from zps.optim.sgd import SGD

X = {"x": torch.ones(4)}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return Settings(runtime_dir=tmp_path / "run", bucket_bytes=4096)


# --- starting -----------------------------------------------------------------------------------


def test_a_hub_is_ready_soon(settings):
    times = []
    for _ in range(3):
        started = time.monotonic()
        with HubProcess.start(settings):
            times.append(time.monotonic() - started)
    print("ready after", ", ".join(f"{seconds:.2f} s" for seconds in times))
    assert min(times) < 3  # under one on a machine that does nothing else


def test_a_hub_at_work_has_not_loaded_torch(settings):
    with HubProcess.start(settings) as hub, together(hub.address, X, "adam") as workers:
        works = [worker.push(X) for worker in workers]
        for work in works:
            work.wait()
        assert "libtorch" not in Path(f"/proc/{hub.pid}/maps").read_text()


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_a_hub_serves_where_it_says(settings, transport):
    bind = f"tcp://127.0.0.1:{free_port()}" if transport == "tcp" else None
    with HubProcess.start(settings, bind=bind) as hub:
        assert hub.address == bind or hub.address.startswith(f"ipc://{settings.runtime_dir}")
        with together(hub.address, X) as workers:
            works = [worker.push(X) for worker in workers]
            assert all(work.wait().done() for work in works)


def test_a_token_names_the_place(settings):
    with HubProcess.start(settings, token="job-7") as hub:
        assert hub.address == f"ipc://{settings.runtime_dir}/job-7/s"
        with pytest.raises(HubUnreachable, match="another hub already serves .*job-7"):
            HubProcess.start(settings, token="job-7")
        with Worker(hub.address, rank=0, world_size=1) as worker:  # the first one lives on
            assert worker.stats()["live"] == [0]
    HubProcess.start(settings, token="job-7").stop()


@pytest.mark.parametrize(
    ("bind", "text"),
    [
        ("tcp://0.0.0.0:5555", "not a loopback address"),
        ("tcp://192.168.1.1:5555", "not a loopback address"),
        ("tcp://*:5555", "not a loopback address"),
        ("tcp://example.org:5555", "not a loopback address"),
        ("tcp://[::]:5555", "not a loopback address"),
        ("udp://127.0.0.1:5555", "cannot be read"),
        ("ipc:///proc/none/s", "cannot listen at ipc:///proc/none/s"),
    ],
)
def test_a_hub_that_cannot_start_says_why(settings, bind, text):
    with pytest.raises(HubUnreachable, match="the hub did not start") as caught:
        HubProcess.start(settings, bind=bind)
    assert text in str(caught.value)


def test_a_port_that_is_taken_is_named(settings):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(HubUnreachable, match=f"cannot listen at {address}"):
            HubProcess.start(settings, bind=address)


def test_a_start_that_failed_leaves_nothing(settings, tmp_path):
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(HubUnreachable):
        HubProcess.start(settings, bind="tcp://0.0.0.0:1")
    assert set(os.listdir("/proc/self/fd")) == before


# --- what it says -------------------------------------------------------------------------------


def test_it_says_when_all_have_joined_and_when_all_have_left(settings):
    with HubProcess.start(settings) as hub:
        assert not hub.formed()
        assert hub.wait_finished(0)  # nothing to wait for
        with Worker(hub.address, rank=0, world_size=2) as first:
            with Worker(hub.address, rank=1, world_size=2) as second:
                assert not hub.formed()
                at_once(lambda: first.declare(X), lambda: second.declare(X))
                while not hub.formed():
                    pass
            assert not hub.wait_finished(0)
        assert hub.wait_finished(20)


# --- ending -------------------------------------------------------------------------------------


def test_stopping_leaves_neither_process_nor_files(settings):
    hub = HubProcess.start(settings)
    hub.stop()
    hub.stop()
    assert hub.poll() == 0
    assert list(settings.runtime_dir.iterdir()) == []


def test_a_hub_that_does_not_end_is_killed_and_swept(settings):
    hub = HubProcess.start(settings)
    os.kill(hub.pid, signal.SIGSTOP)
    hub.stop(timeout_s=0.2)
    assert hub.poll() == -signal.SIGKILL
    assert list(settings.runtime_dir.iterdir()) == []


def test_ctrl_c_is_for_the_parent(settings):
    with HubProcess.start(settings) as hub:
        os.kill(hub.pid, signal.SIGINT)
        with Worker(hub.address, rank=0, world_size=1) as worker:
            assert worker.stats()["live"] == [0]


# --- rules by name ------------------------------------------------------------------------------


def test_a_name_without_a_dot_is_a_rule_of_ours():
    assert RuleResolver(Settings())("sgd") is SGD
    with pytest.raises(ConfigError, match="there is no rule 'lamb'"):
        RuleResolver(Settings())("lamb")


@pytest.mark.parametrize("name", ["os.system", "torch.nn.Linear", "torch.optimizers.X", "my.Opt"])
def test_a_class_is_run_only_if_it_is_allowed(name):
    with pytest.raises(ConfigError, match=f"ZPS_OPTIMIZERS={name}"):
        RuleResolver(Settings())(name)


def test_an_allowed_class_is_imported_when_it_is_asked_for():
    resolver = RuleResolver(Settings(optimizers="my.Opt,tests.hub.nothing.Opt"))
    with pytest.raises(ConfigError, match="cannot import the optimizer 'my.Opt'"):
        resolver("my.Opt")
    assert callable(RuleResolver(Settings())("torch.optim.NAdam"))
