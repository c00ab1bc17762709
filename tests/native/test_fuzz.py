"""Any bytes in a slot are safe: see fuzz_codecs.cpp, which runs under the sanitizers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.native.oracle import ISAS

ROOT = Path(__file__).parents[2]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = {
    "base": [],
    "avx2": ["-mavx2", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c"],
}
ROUNDS = {"base": 50_000, "avx2": 25_000, "avx512": 25_000}  # about two pieces a round


def compiler(folder: Path) -> str:
    """The C++ compiler, if it can build with the sanitizers."""
    chosen = os.environ.get("CXX", "g++")
    source = folder / "empty.cpp"
    source.write_text("int main() {}")
    try:
        subprocess.run(
            [chosen, *SANITIZERS, str(source), "-o", str(folder / "empty")],
            check=True,
            capture_output=True,
        )
        subprocess.run([str(folder / "empty")], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"{chosen} has no working sanitizers: {error}")
    return chosen


@pytest.mark.parametrize("isa", ISAS)
def test_no_bytes_lead_outside_of_a_piece(isa: str, tmp_path: Path) -> None:
    program = tmp_path / "fuzz"
    command = [
        *(compiler(tmp_path), "-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-fno-math-errno"),
        *(*SANITIZERS, *FLAGS[isa], f"-DZPS_TARGET={isa}", f"-I{ROOT / 'csrc'}"),
        str(ROOT / "tests/native/fuzz_codecs.cpp"),
        str(ROOT / "csrc/codec/encoding.cpp"),
        *("-o", str(program)),
    ]
    subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run(
        [str(program), str(ROUNDS[isa]), "1"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == f"{ROUNDS[isa]} rounds\n"
