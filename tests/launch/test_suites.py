"""Where the benchmark suites are looked for."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from zps.errors import ConfigError
from zps.launch import suites


def checkout(folder: Path) -> Path:
    (folder / "csrc").mkdir()
    (folder / "bench").mkdir()
    (folder / "bench" / "__main__.py").touch()
    return folder


def test_in_a_checkout_its_folder_is_run_and_no_other_of_that_name(tmp_path: Path) -> None:
    root = checkout(tmp_path)
    argv, environ = suites.command(["rtt"], root=root, environ={"PYTHONPATH": "/mine"})
    assert argv == [sys.executable, "-m", "bench", "rtt"]
    assert environ["PYTHONPATH"] == os.pathsep.join([str(root), "/mine"])
    assert environ["PYTHONSAFEPATH"] == "1"


def test_an_installed_zps_runs_what_was_installed_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suites, "find_spec", lambda name: name)
    (tmp_path / "bench").mkdir()  # somebody else's package, beside this one
    (tmp_path / "bench" / "__main__.py").touch()
    argv, environ = suites.command(["--list"], root=tmp_path, environ={"HOME": "/"})
    assert argv == [sys.executable, "-m", "zps.bench", "--list"]
    assert environ == {"HOME": "/"}


def test_without_suites_the_error_says_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suites, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install -e"):
        suites.command([], root=tmp_path)
