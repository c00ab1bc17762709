from __future__ import annotations

import os
import subprocess
import sys

from zps.launch import tether


def test_a_command_keeps_its_arguments_its_process_and_its_code() -> None:
    code = "import os, sys; print(os.getpid(), sys.argv[1:]); sys.exit(7)"
    argv = tether.command([sys.executable, "-c", code, "a b", "--", "-x"])
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    out, _ = process.communicate(timeout=60)
    assert out == f"{process.pid} ['a b', '--', '-x']\n"
    assert process.returncode == 7


def test_a_command_whose_parent_is_already_gone_never_starts() -> None:
    argv = tether.command([sys.executable, "-c", "print('started')"])
    argv[argv.index(str(os.getpid()))] = "1"  # as if it had been adopted meanwhile
    process = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (process.stdout, process.returncode) == ("", tether.PARENT_GONE)
