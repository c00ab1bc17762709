"""Sealed shared memory: what it promises, and what a reference may not make us do."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from zps.errors import OutOfMemory, ProtocolError
from zps.memory import segment as module
from zps.memory.segment import (
    HUGE_PAGE,
    SEALS,
    Segment,
    SegmentRef,
    available_bytes,
    private_floats,
)

PIB = 1 << 50


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment.create("test", 10_000)
    yield made
    made.close()


def open_fds() -> set[str]:
    """The descriptors of this process, each with what it is open on."""
    gc.collect()
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
    return found


# --- what it promises ---------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 4097, HUGE_PAGE, HUGE_PAGE + 1])
def test_a_segment_is_zeroed_aligned_and_as_long_as_asked(nbytes):
    made = Segment.create("test", nbytes)
    assert made.bytes.shape == (nbytes,)
    assert not made.bytes.any()
    assert made.address % mmap.PAGESIZE == 0
    made.bytes[:] = 255
    assert made.ref.nbytes == nbytes
    made.close()


def test_all_of_it_is_backed_before_anybody_sees_it(segment):
    # Sparse memory would take a page at the first write, and SIGBUS when there is none.
    info = os.stat(f"/proc/self/fd/{segment.ref.fd}")
    assert info.st_blocks * 512 == info.st_size >= 10_000


def test_a_sealed_segment_neither_shrinks_nor_grows(segment):
    path = f"/proc/{os.getpid()}/fd/{segment.ref.fd}"
    peer = os.open(path, os.O_RDWR)  # as any process of this user can
    try:
        for size in (0, 1, 1 << 20):
            with pytest.raises(PermissionError):
                os.ftruncate(peer, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(peer, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    finally:
        os.close(peer)


def test_both_sides_see_the_same_bytes(segment):
    writable = Segment.attach(segment.ref, writable=True)
    readable = Segment.attach(segment.ref, writable=False)
    segment.bytes[7] = 1
    writable.bytes[9_999] = 2
    assert readable.bytes[[7, 9_999]].tolist() == [1, 2]
    assert segment.bytes[9_999] == 2
    assert len(readable.bytes) == 10_000


def test_a_read_only_mapping_cannot_be_written(segment):
    readable = Segment.attach(segment.ref, writable=False)
    with pytest.raises(ValueError, match="read-only"):
        readable.bytes[0] = 1
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        readable.bytes.flags.writeable = True
    with open("/proc/self/maps") as maps:
        line = next(ln for ln in maps if ln.startswith(f"{readable.address:x}-"))
    assert line.split()[1] == "r--s"


def test_a_mapping_outlives_its_owners_descriptor(segment):
    mapped = Segment.attach(segment.ref, writable=True)
    segment.bytes[0] = 5
    segment.close()
    mapped.bytes[1] = mapped.bytes[0]
    assert mapped.bytes[1] == 5


def test_only_the_owner_hands_out_references(segment):
    with pytest.raises(AssertionError):
        _ = Segment.attach(segment.ref, writable=False).ref


def test_closing_gives_descriptor_and_memory_back():
    before = open_fds()
    made = Segment.create("test", 1 << 20)
    address = f"{made.address:x}-"
    assert open_fds() > before
    made.close()
    made.close()
    assert open_fds() == before
    with open("/proc/self/maps") as maps:
        assert not any(line.startswith(address) for line in maps)


def test_closing_leaves_the_memory_to_whoever_still_looks_in():
    made = Segment.create("test", 4096)
    view = made.bytes[:8]
    made.close()
    view[:] = 3
    assert view.tolist() == [3] * 8


def test_a_segment_that_nobody_closed_closes_itself():
    before = open_fds()
    Segment.create("test", 4096)
    assert open_fds() == before


# --- hostile references -------------------------------------------------------------------------


def memfd(size: int, seals: int = SEALS) -> int:
    fd = os.memfd_create("zps-test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def pipe_end() -> int:
    left, right = os.pipe()
    os.close(right)  # without a writer an open for reading would wait for one
    return left


HOSTILE: dict[str, tuple[Callable[[], int], str]] = {
    "too short": (lambda: memfd(0), "holds 0 bytes, but 4096 were announced"),
    "too long": (lambda: memfd(8192), "holds 8192 bytes, but 4096 were announced"),
    "not sealed": (lambda: memfd(4096, seals=0), "is not sealed"),
    "may still shrink": (lambda: memfd(4096, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL), "not sealed"),
    "may still grow": (lambda: memfd(4096, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL), "not sealed"),
    "a directory": (lambda: os.open("/", os.O_RDONLY), "/proc"),
    "a device": (lambda: os.open("/dev/zero", os.O_RDWR), "holds 0 bytes"),
    "a pipe": (pipe_end, "holds 0 bytes"),
}


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_such_segment_is_not_mapped(name, writable):
    make, text = HOSTILE[name]
    fd = make()
    before = open_fds()
    try:
        with pytest.raises(ProtocolError, match=re.escape(text)):
            Segment.attach(SegmentRef(os.getpid(), fd, 4096), writable=writable)
        assert open_fds() == before
    finally:
        os.close(fd)


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_a_segment_of_another_user_is_not_mapped():
    fd = memfd(4096)
    os.fchown(fd, 12345, 12345)
    with pytest.raises(ProtocolError, match="belongs to user 12345"):
        Segment.attach(SegmentRef(os.getpid(), fd, 4096), writable=False)
    os.close(fd)


def test_a_file_on_disk_is_not_mapped(tmp_path):
    with (tmp_path / "file").open("wb+") as file:
        file.truncate(4096)
        with pytest.raises(ProtocolError):
            Segment.attach(SegmentRef(os.getpid(), file.fileno(), 4096), writable=True)


@pytest.mark.parametrize(
    "change", [{"pid": 0}, {"pid": (1 << 31) - 1}, {"fd": (1 << 32) - 1}, {"fd": 999_999}]
)
def test_a_reference_to_nothing_is_a_protocol_error(segment, change):
    with pytest.raises(ProtocolError, match="cannot open"):
        Segment.attach(replace(segment.ref, **change), writable=True)


@pytest.mark.parametrize("nbytes", [0, 1 << 13, 1 << 40, 1 << 62])
def test_a_reference_with_another_size_is_refused(segment, nbytes):
    with pytest.raises(ProtocolError, match="were announced"):
        Segment.attach(replace(segment.ref, nbytes=nbytes), writable=True)


# --- memory that is not there -------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [PIB, 1 << 62, 1 << 63, 1 << 70])
def test_what_does_not_fit_says_how_much_was_asked_and_is_free(nbytes):
    before = open_fds()
    with pytest.raises(OutOfMemory) as caught:
        Segment.create("weights", nbytes)
    asked, free = (int(n.replace(",", "")) for n in re.findall(r"\d[\d,]{3,}", str(caught.value)))
    assert asked >= nbytes > free > 0
    assert str(caught.value).startswith("weights needs")
    assert open_fds() == before


@pytest.mark.parametrize("count", [PIB // 4, 1 << 62])
def test_private_memory_that_does_not_fit_says_so(count):
    with pytest.raises(OutOfMemory, match=f"{4 * count:,} bytes, but only"):
        private_floats(count, "optimizer state")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOMEM])
def test_memory_that_runs_out_while_pages_are_taken_leaves_nothing(monkeypatch, code):
    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    before = open_fds()
    monkeypatch.setattr(module.os, "posix_fallocate", full)
    with pytest.raises(OutOfMemory, match=f"4,096 bytes.*{os.strerror(code)}"):
        Segment.create("slots-0", 100)
    assert open_fds() == before


def test_without_a_figure_for_free_memory_the_system_still_says_no(monkeypatch):
    monkeypatch.setattr(module, "available_bytes", lambda: None)
    with pytest.raises(OutOfMemory, match=f"{PIB:,}"):
        Segment.create("weights", PIB)
    with pytest.raises(OutOfMemory):
        private_floats(PIB // 4, "state")


LIMITED = """
import os, resource, sys
from zps.errors import OutOfMemory
from zps.memory.segment import Segment, private_floats

limit, kind = sys.argv[1:]
used = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(getattr(resource, limit), (used + (64 << 20),) * 2)
before = os.listdir("/proc/self/fd")
try:
    Segment.create("big", 1 << 30) if kind == "shared" else private_floats(1 << 28, "big")
except OutOfMemory as error:
    print(error)
assert os.listdir("/proc/self/fd") == before
Segment.create("small", 1 << 20).bytes[:] = 1
print("goes on")
"""


@pytest.mark.parametrize(
    ("limit", "kind"),
    [
        ("RLIMIT_AS", "shared"),
        ("RLIMIT_AS", "private"),
        ("RLIMIT_DATA", "private"),
        ("RLIMIT_FSIZE", "shared"),
    ],
)
def test_a_limit_of_the_process_is_out_of_memory_and_not_a_crash(limit, kind):
    command = [sys.executable, "-c", LIMITED, limit, kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    error, last = done.stdout.splitlines()
    assert "1,073,741,824 bytes" in error
    assert (last, done.returncode) == ("goes on", 0)


def test_private_memory_is_zeroed_and_as_long_as_asked():
    for count in (0, 1, 1000, (HUGE_PAGE >> 2) + 1):
        floats = private_floats(count, "state")
        assert floats.dtype == np.float32
        assert floats.shape == (count,)
        assert not floats.any()
        floats[:] = 1


@pytest.mark.parametrize(("cache", "left"), [(0, 1 << 20), (7 << 20, 8 << 20)])
def test_file_cache_in_a_cgroup_is_not_taken_for_use(tmp_path, cache, left):
    group = tmp_path / "sys/fs/cgroup/job"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(f"{64 << 20}\n")
    (group / "memory.current").write_text(f"{63 << 20}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\nslab_reclaimable 0\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    (tmp_path / "proc/meminfo").write_text("MemAvailable:       999999 kB\n")
    assert available_bytes(tmp_path) == left
