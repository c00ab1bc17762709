"""Gradients of scripts that are run here, and stopped."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from zps.errors import ConfigError
from zps.training.current import is_initialized
from zps.tuning import capture

PLAIN = """
import sys, torch
print("args", sys.argv[1:])
w = torch.nn.Parameter(torch.zeros(3)); unused = torch.nn.Parameter(torch.zeros(2, 2))
opt = torch.optim.SGD([w, unused], lr=1.0)
for step in range(100):
    opt.zero_grad(); (w * (step + 1)).sum().backward()
    if step == 1: w.grad[0] = float("inf")
    opt.step()
    open("steps", "a").write("x")
"""

ZPS = """
import torch, zps
if __name__ == "__main__":
    zps.init()
    try:
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
        opt = zps.Optimizer(torch.optim.Adam(model.parameters()), model, {options})
        for _ in range({steps}):
            opt.zero_grad(); model(torch.ones(2, 4)).sum().backward(); opt.step()
    except Exception:
        print("caught")
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZPS_RUNTIME_DIR", str(tmp_path / "r"))


def script(code: str) -> str:
    Path("train.py").write_text(code)
    return "train.py"


def test_a_script_is_stopped_after_its_steps(capsys: pytest.CaptureFixture[str]) -> None:
    argv, path = list(sys.argv), list(sys.path)
    found = capture.run(script(PLAIN), ["--lr", "1"], steps=3)
    assert [p.name for p in found.params] == ["group0.0", "group0.1"]
    assert found.params[1].shape == (2, 2)
    firsts = [step[0].tolist() for step in found.steps]
    assert firsts == [[1.0] * 3, [3.0] * 3, [4.0] * 3], "the one with an infinity is left out"
    assert all(not step[1].any() for step in found.steps), "no gradient counts as zeros"
    assert Path("steps").read_text() == "xxx"
    out, err = capsys.readouterr()
    assert (out, err) == ("", "args ['--lr', '1']\n")
    assert (sys.argv, sys.path) == (argv, path)


@pytest.mark.parametrize("options", ["", "overlap=False", 'apply="worker"'])
def test_a_script_with_zps_has_a_hub_of_its_own(
    options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = {"ZPS_HUB": "tcp://127.0.0.1:9", "ZPS_RANK": "1", "ZPS_WORLD_SIZE": "2"}
    for name, value in foreign.items():
        monkeypatch.setenv(name, value)
    found = capture.run(script(ZPS.format(options=options, steps=50)), steps=2)
    assert [p.name for p in found.params] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert len(found.steps) == 2
    assert found.steps[0][0].any()
    assert not is_initialized()
    assert {name: os.environ[name] for name in foreign} == foreign


def test_a_short_script_gives_what_it_has() -> None:
    assert len(capture.run(script(ZPS.format(options="", steps=2)), steps=5).steps) == 2
    assert len(capture.run(script(PLAIN + "raise SystemExit(0)"), steps=500).steps) == 99


def test_the_memory_of_many_steps_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "MAX_ELEMENTS", 15)
    assert len(capture.run(script(PLAIN), steps=8).steps) == 2
    monkeypatch.setattr(capture, "MAX_ELEMENTS", 1)
    assert len(capture.run(script(PLAIN), steps=8).steps) == 1


def test_a_module_is_run_as_one() -> None:
    script(PLAIN)
    assert len(capture.run("train", steps=1, module=True).steps) == 1


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("pass", "ended before an optimizer took a step"),
        ("raise SystemExit(3)", "train.py ended with 3"),
    ],
)
def test_a_script_without_steps_is_an_error(code: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        capture.run(script(code), steps=1)


def test_a_missing_script_is_an_error() -> None:
    with pytest.raises(ConfigError, match="there is no script 'missing.py'"):
        capture.run("missing.py", steps=1)


def test_the_scripts_own_error_is_passed_on_and_the_hook_is_gone() -> None:
    with pytest.raises(ZeroDivisionError):
        capture.run(script(PLAIN.replace("opt.step()", "opt.step(); 1 / 0")), steps=2)
    recorder = capture.run(script(PLAIN), steps=1)
    assert len(recorder.steps) == 1
