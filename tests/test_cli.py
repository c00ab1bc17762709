from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

#: An address makes `zps launch` use that hub: these workers never talk to one.
NO_HUB = {"ZPS_HUB": "tcp://127.0.0.1:9"}
TELL = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['ZPS_RANK']]))"


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def zps(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    base = {name: value for name, value in os.environ.items() if not name.startswith("ZPS_")}
    return subprocess.run(
        [sys.executable, "-m", "zps", *args],
        env={**base, **environ},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def script(name: str, code: str) -> str:
    Path(name).write_text(code)
    return name


# launch


def test_everything_after_the_script_is_the_scripts_own() -> None:
    args = ["-n", "7", "--mode", "odd", "--", "-m", "--help", "", "a b"]
    result = zps("launch", "-n", "2", script("tell.py", TELL), *args, **NO_HUB)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == [
        f"[{rank}] {json.dumps([args, str(rank)])}" for rank in (0, 1)
    ]


def test_a_module_is_run_as_one() -> None:
    script("mod.py", TELL)
    result = zps("launch", "-m", "mod", "--lr", "1", **NO_HUB)
    assert result.stdout == f"[0] {json.dumps([['--lr', '1'], '0'])}\n", result.stderr


def test_launch_ends_with_the_first_failing_workers_code() -> None:
    code = "import os; raise SystemExit(3 if os.environ['RANK'] == '1' else 0)"
    result = zps("launch", "-n", "2", script("fail.py", code), **NO_HUB)
    assert result.returncode == 3
    assert "zps launch: rank 1 exited with code 3" in result.stderr


def test_options_become_settings_of_every_worker() -> None:
    code = "import os; print(os.environ['ZPS_MODE'], os.environ['ZPS_STALENESS'])"
    options = ["--mode", "ssp", "--set", "staleness=4"]
    result = zps("launch", *options, script("show.py", code), **NO_HUB)
    assert result.stdout == "[0] ssp 4\n", result.stderr


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["missing.py"], "there is no script 'missing.py'"),
        (["--hubs", "0", "-m", "mod"], "at least one hub"),
        (["-n", "0", "-m", "mod"], "at least one worker"),
        (["--mode", "bps", "-m", "mod"], "mode='bps': must be 'bsp', 'ssp' or 'async'"),
        (["--set", "mod=bsp", "-m", "mod"], "did you mean mode?"),
        (["--set", "mode", "-m", "mod"], "write it as NAME=VALUE"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(args: list[str], text: str) -> None:
    result = zps("launch", *args, **NO_HUB)
    assert result.returncode == 2
    assert result.stderr.startswith("zps: error: ")
    assert text in result.stderr
    assert "Traceback" not in result.stderr


def on_a_terminal(*args: str) -> str:
    """What `zps launch ARGS` writes to its terminal."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "zps", "launch", *args],
        env={**os.environ, **NO_HUB, "TERM": "xterm", "NO_COLOR": "1"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    text = b""
    try:
        while data := os.read(master, 4096):
            text += data
    except OSError:  # EIO: the last process has closed the terminal
        pass
    os.close(master)
    assert process.wait(60) == 0, text
    return text.decode()


def test_on_a_terminal_rank_0_has_it_to_itself() -> None:
    name = script("tty.py", "import os, sys; print(os.environ['RANK'], sys.stdout.isatty())")
    lines = on_a_terminal("-n", "2", name).split("\r\n")
    assert "0 True" in lines
    assert "[1] 1 False" in lines


def test_on_a_terminal_rank_0_can_be_prefixed_too() -> None:
    name = script("tty.py", "import os, sys; print(os.environ['RANK'], sys.stdout.isatty())")
    assert on_a_terminal("--prefix-all", name).split("\r\n")[0] == "[0] 0 False"


# hub


def test_hub_says_where_it_serves_and_ends_cleanly_with_a_signal(tmp_path: Path) -> None:
    runtime_dir = tmp_path / "r"
    with subprocess.Popen(
        [sys.executable, "-m", "zps", "hub", "--world-size", "2"],
        env={**os.environ, "ZPS_RUNTIME_DIR": str(runtime_dir)},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith(f"zps hub: serving at ipc://{runtime_dir}/"), line
        process.terminate()
        assert process.wait(60) == 0, process.stderr.read()
    assert list(runtime_dir.iterdir()) == []


def test_hub_refuses_an_address_that_others_can_reach() -> None:
    result = zps("hub", "--bind", "tcp://0.0.0.0:5555")
    assert result.returncode == 2
    assert "not a loopback address" in result.stderr


# config


def test_config_shows_value_and_source_of_every_setting() -> None:
    result = zps("config", "--set", "job=night", ZPS_MODE="ssp")
    rows = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if "│" in line}
    assert "ssp" in rows["mode"]
    assert "ZPS_MODE" in rows["mode"]
    assert "argument" in rows["job"]
    assert "default" in rows["quorum"]


def test_config_as_json_is_for_programs() -> None:
    rows = json.loads(zps("config", "--json", ZPS_HUB="tcp://[::1]:5").stdout)
    first = rows[0]
    assert first["setting"] == "hub"
    assert first["variable"] == "ZPS_HUB"
    assert first["value"] == "tcp://[::1]:5"
    assert first["source"] == "ZPS_HUB"
    assert first["help"]


def test_config_shows_brackets_as_they_are() -> None:
    assert "tcp://[::1]:5" in zps("config", ZPS_HUB="tcp://[::1]:5").stdout


def test_config_names_a_misspelt_variable() -> None:
    result = zps("config", ZPS_MODDE="ssp")
    assert result.returncode == 2
    assert result.stderr == ("zps: error: there is no variable ZPS_MODDE; did you mean ZPS_MODE?\n")


# doctor


def test_doctor_fails_with_exit_code_1_and_says_why() -> None:
    result = zps("doctor", "--json", ZPS_MODDE="ssp")
    checks = {check["name"]: check for check in json.loads(result.stdout)}
    assert result.returncode == 1
    assert checks["settings"]["status"] == "fail"
    assert "ZPS_MODE" in checks["settings"]["detail"]


def test_doctor_shows_a_table_of_checks(tmp_path: Path) -> None:
    result = zps("doctor", ZPS_RUNTIME_DIR=str(tmp_path / "r"))
    assert result.returncode == 0, result.stdout
    assert "round trip" in result.stdout
