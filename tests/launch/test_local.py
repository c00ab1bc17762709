from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from zps.config import Settings
from zps.errors import ConfigError
from zps.hub.process import HubProcess
from zps.launch.local import Hubs, Plan, command, launch, worker_environment

ADDRESS = "ipc:///run/hub"


def test_a_worker_is_told_its_place_in_our_words_and_in_others() -> None:
    settings = Settings(mode="ssp", world_size=3)
    environ = worker_environment({"PATH": "/bin"}, settings, ADDRESS, 1, 3)
    expected = {
        "PATH": "/bin",
        "ZPS_HUB": ADDRESS,
        "ZPS_RANK": "1",
        "ZPS_WORLD_SIZE": "3",
        "ZPS_MODE": "ssp",
        "RANK": "1",
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "PYTHONUNBUFFERED": "1",
    }
    assert expected.items() <= environ.items()


def test_the_settings_a_worker_loads_are_the_launchers() -> None:
    settings = Settings(mode="async", bucket_bytes="1MiB", world_size=2)
    environ = worker_environment({"ZPS_MODE": "bsp"}, settings, ADDRESS, 0, 2)
    loaded = Settings.load(environ=environ)
    assert (loaded.mode, loaded.bucket_bytes, loaded.hubs) == ("async", 1 << 20, (ADDRESS,))


def test_cores_are_shared_out_unless_somebody_has_decided() -> None:
    cores = len(os.sched_getaffinity(0))

    def threads(base: dict[str, str], workers: int) -> str:
        return worker_environment(base, Settings(), ADDRESS, 0, workers)["OMP_NUM_THREADS"]

    assert threads({}, 1) == str(cores)
    assert threads({}, cores * 4) == "1"
    assert threads({"OMP_NUM_THREADS": "7"}, 1) == "7"


def test_a_command_runs_a_script_or_a_module_with_this_python(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.touch()
    assert command(str(script), ["-n", "x"], module=False) == [
        sys.executable,
        str(script),
        "-n",
        "x",
    ]
    assert command("pkg.train", ["-m"], module=True) == [sys.executable, "-m", "pkg.train", "-m"]


def test_a_plan_that_cannot_work_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="there is no script 'missing.py'"):
        command("missing.py", [], module=False)
    with pytest.raises(ConfigError, match="at least one hub"):
        Plan(command=[], workers=1, hubs=0)
    with pytest.raises(ConfigError, match="at least one worker"):
        Plan(command=[], workers=0)


def test_hubs_are_not_started_beside_others() -> None:
    plan = Plan(command=[], workers=1, hubs=2)
    with pytest.raises(ConfigError, match="--hubs 2, but ZPS_HUB names hubs already"):
        launch(plan, {"ZPS_HUB": ADDRESS}, print)


class FakeHub:
    def __init__(self, pid: int, code: int | None = None, formed: bool = True) -> None:
        self.pid = pid
        self.address = f"ipc:///hub/{pid}"
        self.stopped = False
        self._code = code
        self._formed = formed

    def formed(self) -> bool:
        return self._formed

    def poll(self) -> int | None:
        return self._code

    def stop(self, timeout_s: float) -> None:
        self.stopped = True


@pytest.mark.parametrize(
    ("hubs", "environ", "threads"),
    [
        (1, {}, None),
        (2, {}, max(1, len(os.sched_getaffinity(0)) // 2)),
        (1000, {}, 1),
        (2, {"ZPS_HUB_THREADS": "7"}, 7),
    ],
)
def test_hubs_share_the_cores_and_are_named_in_order(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    hubs: int,
    environ: dict[str, str],
    threads: int | None,
) -> None:
    started: list[FakeHub] = []

    def start(settings: Settings) -> FakeHub:
        assert settings.hub_threads == threads
        started.append(FakeHub(len(started)))
        return started[-1]

    monkeypatch.setattr(HubProcess, "start", start)
    told = tmp_path / "told"
    code = f"import os; open({str(told)!r}, 'w').write(os.environ['ZPS_HUB'])"
    plan = Plan(command=[sys.executable, "-c", code], workers=1, hubs=hubs)
    assert launch(plan, environ, print) == 0
    assert told.read_text() == ",".join(hub.address for hub in started)
    assert len(started) == hubs
    assert all(hub.stopped for hub in started)


@pytest.mark.parametrize(
    ("codes", "code", "pid"),
    [
        ([None, None], None, 1),
        ([None, -9], -9, 2),
        ([0, None], 0, 1),
        ([0, -9], -9, 2),
        ([3, -9], 3, 1),
    ],
)
def test_hubs_have_ended_as_soon_as_one_has(
    codes: list[int | None], code: int | None, pid: int
) -> None:
    hubs = Hubs([FakeHub(number, code) for number, code in enumerate(codes, 1)])
    assert (hubs.poll(), hubs.pid) == (code, pid)


def test_hubs_have_formed_when_all_have() -> None:
    assert Hubs([FakeHub(1), FakeHub(2)]).formed()
    assert not Hubs([FakeHub(1), FakeHub(2, formed=False)]).formed()


def test_a_worker_of_one_node_of_several_is_told_both_places() -> None:
    settings = Settings(nodes=3, node_rank=1, world_size=12, node_hub=True, hub="tcp://10.0.0.1:7")
    environ = worker_environment({"ZPS_NODE_HUB": "1"}, settings, ADDRESS, 2, 4)
    expected = {
        "ZPS_HUB": ADDRESS,
        "ZPS_RANK": "6",
        "ZPS_WORLD_SIZE": "12",
        "RANK": "6",
        "WORLD_SIZE": "12",
        "LOCAL_RANK": "2",
        "LOCAL_WORLD_SIZE": "4",
    }
    assert expected.items() <= environ.items()
    assert not Settings.load(environ=environ).node_hub


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        ({"nodes": 2, "node_rank": 0}, "nodes=2 needs a hub that all of them can reach"),
        ({"nodes": 2, "hub": "tcp://h:1"}, "and this one's number"),
        ({"node_hub": True, "hub": "tcp://h:1"}, "node_hub needs nodes and node_rank"),
    ],
)
def test_a_node_that_does_not_know_its_place_is_not_started(
    chosen: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        launch(Plan(["true"], 2), {"ZPS_CONFIG": os.devnull}, print, **chosen)
