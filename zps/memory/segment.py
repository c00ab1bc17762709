"""Sealed anonymous shared memory that another process of the same user can open.

A segment is a memfd: it has no name, so nothing leaks when a process is killed. It is backed in
full and sealed before anybody else sees it, so neither a full memory nor a hostile peer's
`ftruncate` can turn a later access into SIGBUS.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zps.errors import OutOfMemory, ProtocolError

HUGE_PAGE = 2 << 20
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MADV_POPULATE_WRITE = 23  # Linux 5.14; reports a failure where a plain write would be SIGBUS


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """Where another process of the same user and PID namespace finds a segment."""

    pid: int
    fd: int
    nbytes: int

    @property
    def path(self) -> str:
        return f"/proc/{self.pid}/fd/{self.fd}"

    def check(self) -> None:
        """Raise ProtocolError unless this process may open it, and it is what it says."""
        os.close(_open(self, writable=True))


class Segment:
    """One mapping of a sealed memfd. Keep it alive for as long as its address is used."""

    def __init__(self, fd: int, mapping: mmap.mmap, nbytes: int, *, owner: bool, writable: bool):
        self._fd = fd
        self.nbytes = nbytes
        self._owner = owner
        self.bytes = np.frombuffer(mapping, np.uint8)[:nbytes]
        self.address: int = self.bytes.ctypes.data
        self.writable = writable

    @classmethod
    def create(cls, label: str, nbytes: int) -> Segment:
        """Make a zeroed, backed and sealed segment of at least one byte.

        Raises OutOfMemory, before or while pages are taken, with what was asked and is free.
        """
        size = _rounded(max(nbytes, 1))
        ensure_available(size, label)
        fd = -1
        try:
            fd = os.memfd_create(f"zps-{label}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, size)
            mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
            _populate(mapping, fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        except (OSError, OverflowError, ValueError) as error:
            if fd >= 0:
                os.close(fd)
            raise OutOfMemory(
                f"the {label} segment needs {size:,} bytes of shared memory: {error}. "
                "Free memory, or use a smaller model."
            ) from error
        return cls(fd, mapping, nbytes, owner=True, writable=True)

    @classmethod
    def attach(cls, ref: SegmentRef, *, writable: bool) -> Segment:
        """Map another process's segment; raises ProtocolError when it is not what `ref` says."""
        fd = _open(ref, writable=writable)
        try:
            prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            kind = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
            mapping = mmap.mmap(fd, _rounded(max(ref.nbytes, 1)), flags=kind, prot=prot)
            _advise(mapping, mmap.MADV_HUGEPAGE)
        except OSError as error:
            raise ProtocolError(f"cannot map {ref.path}, the hub's memory: {error}") from error
        finally:
            os.close(fd)
        return cls(-1, mapping, ref.nbytes, owner=False, writable=writable)

    def __del__(self) -> None:
        if self._fd >= 0:  # a job that could not be set up in full has nobody to close its parts
            os.close(self._fd)

    @property
    def ref(self) -> SegmentRef:
        """How other processes find this segment; only its creator can say."""
        assert self._owner, "only the creator of a segment hands out references"
        return SegmentRef(os.getpid(), self._fd, self.nbytes)

    def close(self) -> None:
        """Drop this object's hold. The mapping goes with the last array or tensor that looks in:
        another thread may be reading through one just now."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.bytes = np.empty(0, np.uint8)


def _open(ref: SegmentRef, *, writable: bool) -> int:
    """A descriptor of another process's segment. Raises ProtocolError."""
    try:
        # Not blocking, because what a hostile reference names may be a pipe.
        flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDWR if writable else os.O_RDONLY)
        fd = os.open(ref.path, flags)
    except OSError as error:
        raise ProtocolError(
            f"cannot open the hub's shared memory at {ref.path}: {error}"
        ) from error
    try:
        info = os.fstat(fd)
        if info.st_uid != os.geteuid():
            raise ProtocolError(f"{ref.path} belongs to user {info.st_uid}, not to you")
        if info.st_size != _rounded(max(ref.nbytes, 1)):
            raise ProtocolError(
                f"{ref.path} holds {info.st_size} bytes, but {ref.nbytes} were announced"
            )
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise ProtocolError(f"{ref.path} is not sealed, so its owner could cut it under us")
    except OSError as error:
        os.close(fd)
        raise ProtocolError(f"{ref.path} is no shared memory of a hub: {error}") from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def ensure_available(nbytes: int, what: str) -> None:
    """Raise OutOfMemory when `nbytes` more would not fit into this machine or its cgroup."""
    free = available_bytes()
    if free is not None and nbytes > free:
        raise OutOfMemory(
            f"{what} needs {nbytes:,} bytes, but only {free:,} are available. "
            "Free memory, or use a smaller model."
        )


def available_bytes(root: Path = Path("/")) -> int | None:
    """What can still be allocated: by /proc/meminfo, and by the cgroups that hold this process.

    A cgroup's file cache is counted as used, but goes when memory is needed. None if unknown.
    """
    limits: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        limits += [int(ln.split()[1]) * 1024 for ln in lines if ln.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):
        own = (root / "proc/self/cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
        top = root / "sys/fs/cgroup"
        for group in (top / own, *(top / own).parents):
            limits += _cgroup_room(group)
            if group == top:
                break
    return min(limits) if limits else None


def _cgroup_room(group: Path) -> list[int]:
    """The bytes left under the limit of one cgroup (version 2); nothing when it has none."""
    with contextlib.suppress(OSError, ValueError):
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            used = int((group / "memory.current").read_text())
            for line in (group / "memory.stat").read_text().splitlines():
                name, _, value = line.partition(" ")
                if name in ("inactive_file", "active_file", "slab_reclaimable"):
                    used -= int(value)
            return [max(0, int(limit) - used)]
    return []


def private_floats(count: int, what: str) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Zeroed float32 memory of this process alone, on huge pages where the system allows."""
    size = _rounded(max(count * 4, 1))
    ensure_available(size, what)
    try:
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise OutOfMemory(f"{what} needs {size:,} bytes: {error}") from error
    _advise(mapping, mmap.MADV_HUGEPAGE)
    _advise(mapping, _MADV_POPULATE_WRITE)
    return np.frombuffer(mapping, np.float32)[:count]


def private_bytes(nbytes: int, what: str) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The same as bytes; at least one is there behind them."""
    return private_floats(-(-nbytes // 4), what).view(np.uint8)[:nbytes]


def _rounded(nbytes: int) -> int:
    unit = HUGE_PAGE if nbytes >= HUGE_PAGE else mmap.PAGESIZE
    return -(-nbytes // unit) * unit


def _populate(mapping: mmap.mmap, fd: int, size: int) -> None:
    # Huge pages are only given to a mapping, so it faults the pages in before fallocate fills gaps.
    _advise(mapping, mmap.MADV_HUGEPAGE)
    _advise(mapping, _MADV_POPULATE_WRITE)
    os.posix_fallocate(fd, 0, size)


def _advise(mapping: mmap.mmap, advice: int) -> None:
    with contextlib.suppress(OSError):  # advice this kernel does not know
        mapping.madvise(advice)
