"""Where the benchmark suites are: part of a wheel, or the folder `bench/` of a checkout."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from zps.errors import ConfigError

__all__ = ["command"]

_INSTALLED, _IN_A_CHECKOUT = "zps.bench", "bench"
_ROOT = Path(__file__).parent.parent.parent


def command(
    args: Sequence[str], *, root: Path = _ROOT, environ: Mapping[str, str] = os.environ
) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of a process that runs the suites with these arguments.

    A process of its own, because those that the suites start begin as copies of it: this one is a
    script, which they would run again. Raises ConfigError when the suites are not there.
    """
    if (root / _IN_A_CHECKOUT / "__main__.py").exists() and (root / "csrc").exists():
        path = [str(root), *filter(None, [environ.get("PYTHONPATH")])]
        # Safe: a folder `bench` where the user happens to be is not the one that is meant.
        found = {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}
        return [sys.executable, "-m", _IN_A_CHECKOUT, *args], {**environ, **found}
    if not find_spec(_INSTALLED):
        raise ConfigError(
            "the benchmark suites are not installed with this zps: run `zps bench` where its "
            "source is, after `pip install -e .` there"
        )
    return [sys.executable, "-m", _INSTALLED, *args], dict(environ)
