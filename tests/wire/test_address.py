"""The private directory in which a hub's socket lives."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from zps.errors import ConfigError, HubError
from zps.wire import address as module
from zps.wire.address import IpcHome, ensure_private, home_of, ipc_address, sweep, sweep_home


@pytest.fixture
def runtime_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_a_runtime_dir_that_is_too_long_is_refused_before_anything_is_made(tmp_path):
    deep = tmp_path / ("x" * 110)
    with pytest.raises(ConfigError, match="shorter directory"):
        IpcHome.claim(deep, "token")
    assert not deep.exists() or not list(deep.iterdir())


def test_the_home_of_an_address_is_known_to_all_who_know_the_token(runtime_dir):
    home = IpcHome.claim(runtime_dir, "token")
    assert home.address == ipc_address(runtime_dir, "token")
    assert home_of(home.address) == home.path
    assert home_of("tcp://127.0.0.1:5555") is None
    assert home_of("ipc:///somebody/elses.sock") is None
    home.release()


# --- homes --------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from zps.wire.address import IpcHome

home = IpcHome.claim(Path(sys.argv[1]), sys.argv[2])
(home.path / "s").touch()
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held_by_another(runtime_dir: Path, token: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has claimed a home, until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(runtime_dir), token],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_home_is_a_directory_of_this_user_alone(runtime_dir):
    home = IpcHome.claim(runtime_dir)
    for directory in (runtime_dir, home.path):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((home.path / "lock").stat().st_mode) == 0o600
    home.release()


def test_homes_without_a_token_are_all_different(runtime_dir):
    homes = [IpcHome.claim(runtime_dir) for _ in range(5)]
    assert len({home.address for home in homes}) == 5
    for home in homes:
        home.release()
    assert list(runtime_dir.iterdir()) == []


def test_releasing_leaves_nothing_and_may_be_repeated(runtime_dir):
    home = IpcHome.claim(runtime_dir, "token")
    (home.path / "s").touch()
    home.release()
    home.release()
    assert list(runtime_dir.iterdir()) == []
    IpcHome.claim(runtime_dir, "token").release()


def test_a_second_claim_is_refused_and_does_the_first_no_harm(runtime_dir):
    with held_by_another(runtime_dir, "token"):
        with pytest.raises(HubError, match="another hub already serves .*token"):
            IpcHome.claim(runtime_dir, "token")
        assert (runtime_dir / "token" / "s").exists()
        IpcHome.claim(runtime_dir, "other").release()
        assert (runtime_dir / "token" / "s").exists()


def test_a_home_whose_hub_was_killed_is_taken_over_with_its_token(runtime_dir):
    with held_by_another(runtime_dir, "token") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (runtime_dir / "token" / "s").exists()
        home = IpcHome.claim(runtime_dir, "token")
        assert not (home.path / "s").exists()  # nobody connects to the dead one's socket
        home.release()


def test_claiming_sweeps_the_dead_and_leaves_the_living(runtime_dir):
    with held_by_another(runtime_dir, "alive"), held_by_another(runtime_dir, "dead") as process:
        process.kill()
        process.wait()
        home = IpcHome.claim(runtime_dir, "mine")
        assert {path.name for path in runtime_dir.iterdir()} == {"alive", "mine"}
        assert (runtime_dir / "alive" / "s").exists()
        home.release()


def test_sweeping_leaves_what_is_not_a_home(runtime_dir):
    ensure_private(runtime_dir)
    (runtime_dir / "notes.txt").write_text("mine")
    (runtime_dir / "folder").mkdir()
    (runtime_dir / "folder" / "file").touch()
    (runtime_dir / "shared").mkdir()
    (runtime_dir / "shared" / "lock").touch()
    (runtime_dir / "shared" / "thesis.tex").touch()
    sweep(runtime_dir)
    assert (runtime_dir / "notes.txt").exists()
    assert (runtime_dir / "folder" / "file").exists()
    assert (runtime_dir / "shared" / "thesis.tex").exists()
    sweep_home(runtime_dir / "nothing")


def test_of_those_who_claim_one_token_at_a_time_one_has_it(runtime_dir):
    """Each takes the home, looks whether it is alone, and gives it back, over and over."""
    code = """
import sys
from pathlib import Path
from zps.errors import HubError
from zps.wire.address import IpcHome

runtime_dir, got = Path(sys.argv[1]), 0
while got < 200:
    try:
        home = IpcHome.claim(runtime_dir, "token")
    except HubError:
        continue
    (home.path / "s").touch(exist_ok=False)
    got += 1
    home.release()
print(got)
"""
    command = [sys.executable, "-c", code, str(runtime_dir)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=60)[0] for process in processes] == ["200\n"] * 3
    assert list(runtime_dir.iterdir()) == []


# --- directories of others ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o770, 0o777, 0o710])
def test_a_directory_that_others_may_enter_is_refused(runtime_dir, mode):
    runtime_dir.mkdir()
    runtime_dir.chmod(mode)
    with pytest.raises(HubError, match=f"chmod 700 {runtime_dir}"):
        IpcHome.claim(runtime_dir)
    assert list(runtime_dir.iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives directories away")
def test_a_directory_of_another_user_is_refused(runtime_dir):
    runtime_dir.mkdir(mode=0o700)
    os.chown(runtime_dir, 12345, 12345)
    with pytest.raises(HubError, match="a directory of yours alone"):
        IpcHome.claim(runtime_dir)


def test_a_link_to_a_directory_is_refused(tmp_path, runtime_dir):
    (tmp_path / "target").mkdir(mode=0o700)
    runtime_dir.symlink_to(tmp_path / "target")
    with pytest.raises(HubError, match="a directory of yours alone"):
        IpcHome.claim(runtime_dir)


def test_a_file_in_its_place_is_an_error_of_ours(runtime_dir):
    runtime_dir.touch()
    with pytest.raises(HubError):
        IpcHome.claim(runtime_dir)


def test_a_directory_that_cannot_be_made_is_an_error_of_ours():
    with pytest.raises(HubError, match="ZPS_RUNTIME_DIR"):
        IpcHome.claim(Path("/proc/zps"))


def test_losing_every_race_is_an_error_and_not_an_endless_loop(runtime_dir, monkeypatch):
    def swept(*_: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(module, "_lock", swept)
    with pytest.raises(HubError, match="cannot take a directory"):
        IpcHome.claim(runtime_dir, "token")
