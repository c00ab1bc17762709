from __future__ import annotations

import importlib.util
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

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


NET = """
import torch
class Net(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(64, 256), torch.nn.LayerNorm(256))
        self.tied = self[0].weight
def wide(): return torch.nn.Linear(4096, 1024, bias=False).bfloat16()
def nothing(): return 3
if __name__ == "__main__": raise SystemExit("ran")
"""


def sizes(factory: str, **environ: str) -> dict[str, Any]:
    result = zps("config", "--json", "--model", factory, **environ)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["model"]


def test_config_shows_what_a_models_rounds_weigh() -> None:
    found = sizes(
        f"{script('net.py', NET)}:Net",
        ZPS_COMPRESSION="int8; 0.*=bf16",
        ZPS_COMPRESSION_MIN_BYTES="1024",
        ZPS_PULL_COMPRESSION="fp16",
    )
    rows = {row["parameter"]: row for row in found["rows"]}
    assert list(rows) == ["tied", "0.bias", "1.weight", "1.bias"]
    assert rows["tied"] == {
        "parameter": "tied",
        "shape": [256, 64],
        "dtype": "float32",
        "codec": "int8",
        "nbytes": 65536,
        "encoded_nbytes": 16384 + 256,
    }
    assert (rows["0.bias"]["codec"], rows["0.bias"]["encoded_nbytes"]) == ("bf16", 512)
    push, pull = found["push"], found["pull"]
    assert (push["nbytes"], push["compression"]) == (65536 + 3 * 1024, "int8; 0.*=bf16")
    assert push["encoded_nbytes"] == sum(-(-r["encoded_nbytes"] // 64) * 64 for r in rows.values())
    assert pull["encoded_nbytes"] * 2 == pull["nbytes"]
    assert found["residual_nbytes"] == 8 * (256 * 64 + 2 * 256)
    assert found["warnings"] == []


def test_a_module_on_the_path_and_tensors_too_small_to_compress() -> None:
    script("mod.py", NET)
    found = sizes("mod:wide", ZPS_COMPRESSION="int8")
    assert found["rows"][0]["nbytes"] == 2 * 2**22
    assert found["push"]["encoded_nbytes"] == 2**22 + 2**16
    small = sizes("mod:Net", ZPS_COMPRESSION="int8")
    assert [row["codec"] for row in small["rows"]] == ["int8", "none", "none", "none"]


def test_a_pattern_without_a_parameter_is_a_warning() -> None:
    environ = {"ZPS_COMPRESSION": "int8; lineer.*=none", "ZPS_PULL_COMPRESSION": "*.biass=bf16"}
    result = zps("config", "--model", f"{script('net.py', NET)}:Net", **environ)
    assert result.returncode == 0
    assert [line for line in result.stderr.splitlines() if "zps config" in line] == [
        "zps config: warning: ZPS_COMPRESSION: the pattern 'lineer.*' matches no parameter; "
        "the nearest is 'tied'",
        "zps config: warning: ZPS_PULL_COMPRESSION: the pattern '*.biass' matches no parameter; "
        "the nearest is '1.bias'",
    ]
    assert "256 × 64" in result.stdout
    assert "a round of one worker" in result.stdout
    assert "ZPS_COMPRESSION" in "".join(sizes("net.py:Net", **environ)["warnings"])


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        ("net.py", "write it as module.path:factory"),
        ("missing.py:Net", "there is no script 'missing.py'"),
        ("no.such.module:Net", "no.such.module cannot be imported"),
        ("net.py:Nett", "net.py has no 'Nett'; did you mean Net?"),
        ("net.py:torch.nn.Linear", "it failed with TypeError"),
        ("net.py:nothing", "it returned int, no nn.Module"),
        ("net.py:__name__", "neither a class nor a function"),
    ],
)
def test_a_model_that_cannot_be_made_is_one_line_and_exit_code_2(factory: str, text: str) -> None:
    script("net.py", NET)
    result = zps("config", "--model", factory)
    assert result.returncode == 2
    assert text in result.stderr
    assert "Traceback" not in result.stderr


def test_config_shows_where_a_codec_is_misspelt() -> None:
    result = zps("config", ZPS_COMPRESSION="int8; *.bias=nnone")
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert lines[0].startswith("zps: error: ZPS_COMPRESSION: there is no codec 'nnone'")
    assert lines[1].index("nnone") == lines[2].index("^")


# tune


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["missing.py"], "there is no script 'missing.py'"),
        (["--bandwidth", "fast", "train.py"], "--bandwidth fast: write it as 10Gbit/s"),
        (["--try", "int8", "--try", "int9", "train.py"], "did you mean 'int8'?"),
        (["--set", "mod=bsp", "train.py"], "did you mean mode?"),
    ],
)
def test_tune_finds_a_mistake_before_it_runs_the_script(args: list[str], text: str) -> None:
    script("train.py", "open('ran', 'w')")
    result = zps("tune", *args)
    assert result.returncode == 2
    assert text in result.stderr
    assert not Path("ran").exists()


def test_tune_measures_a_scripts_gradients_and_advises(tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "model = torch.nn.Linear(100, 100); opt = torch.optim.SGD(model.parameters())\n"
        "while True:\n"
        "    opt.zero_grad(); model(torch.randn(8, 100)).square().sum().backward(); opt.step()\n"
    )
    draws = importlib.util.find_spec("matplotlib") is not None
    options = ["--bandwidth", "1Mbit/s", "--try", "int8", "--try", "onebit"]
    options += ["--plot", "tune.svg"] if draws else []
    arguments = [script("train.py", code), "--bandwidth", "x"]
    result = zps("tune", *options, *arguments, ZPS_RUNTIME_DIR=str(tmp_path / "r"))
    assert result.returncode == 0, result.stderr
    assert "\nZPS_COMPRESSION=int8\n" in result.stdout
    assert "(measured)" not in result.stdout
    assert Path("tune.svg").exists() == draws
    found = json.loads(zps("tune", "--json", *options[2:], *arguments, ZPS_LINK="message").stdout)
    assert found["bandwidth"] == found["link"]["to_hub"] > 1e6
    assert found["link"]["how"] == "measured with messages to a hub started for it"


def test_tune_says_that_it_cannot_reach_the_hub_before_it_runs_the_script() -> None:
    script("train.py", "open('ran', 'w')")
    wait = ("--set", "connect_timeout_s=0.3")
    result = zps("tune", "--hub", "tcp://127.0.0.1:9", *wait, "train.py")
    assert result.returncode == 1
    assert "no hub took a message at tcp://127.0.0.1:9 for 0.3 s" in result.stderr
    assert not Path("ran").exists()


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


# bench


def test_the_suites_of_a_checkout_are_found_from_anywhere_and_take_their_own_options() -> None:
    Path("bench").mkdir()
    script("bench/__main__.py", "raise SystemExit('not this one')")
    result = zps("bench", "--list", "rtt")
    assert result.returncode == 0, result.stderr
    assert "zps, echo" in result.stderr
    result = zps("bench", "--help")
    assert "Usage: zps bench [OPTIONS] [SUITE]..." in " ".join(result.stdout.split())
    result = zps("bench", "stp")
    assert result.returncode == 2
    assert "unknown suite 'stp' (did you mean 'step'?)" in result.stderr
