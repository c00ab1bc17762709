"""Does this machine have what zps needs? One small check a question, each with a way out."""

from __future__ import annotations

import os
import resource
import socket
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from zps.config import Settings
from zps.errors import ConfigError

__all__ = ["CHECKS", "Check", "Finding", "examine"]

Status = Literal["ok", "warn", "fail"]
SHMEM_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_MIB = 1 << 20
_ROUND_TRIPS = 20


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check saw. `advice` is what to do about it; empty when there is nothing to do."""

    status: Status
    detail: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    detail: str
    advice: str


def examine(environ: Mapping[str, str] | None = None) -> list[Check]:
    """Run every check, the settings' first; a check that raises has failed, and ends no other."""
    try:
        settings = Settings.load(environ=environ)
        first = Finding("ok", ", ".join(settings.explicit()) or "all at their defaults")
    except ConfigError as error:
        settings = Settings()
        first = Finding("fail", str(error), "correct it; `zps config` lists every setting")
    findings = {"settings": first}
    for name, (check, advice) in CHECKS.items():
        try:
            findings[name] = check(settings)
        except Exception as error:  # whatever it is, it is the finding
            findings[name] = Finding("fail", f"{type(error).__name__}: {error}", advice)
    return [
        Check(name, finding.status, finding.detail, finding.advice)
        for name, finding in findings.items()
    ]


def native_module(_: Settings) -> Finding:
    from zps import native

    return Finding("ok", f"instruction set {native.isa()}, of {', '.join(native.isas())}")


def sealed_memory(_: Settings) -> Finding:
    from zps.memory.segment import Segment

    segment = Segment.create("doctor", _MIB)
    try:
        other = Segment.attach(segment.ref, writable=False)  # through /proc, as a worker does
        other.close()
        with open(f"/proc/self/fd/{segment.ref.fd}", "r+b") as file:
            try:
                file.truncate(0)
            except PermissionError:
                return Finding("ok", "memfd, sealed, opened through /proc")
        return Finding("fail", "a sealed segment could be cut", "use Linux 3.17 or later")
    finally:
        segment.close()


def ipc_directory(settings: Settings) -> Finding:
    from zps.wire.address import IpcHome

    home = IpcHome.claim(settings.runtime_dir)
    try:
        length = len(os.fsencode(home.address.removeprefix("ipc://")))
        return Finding("ok", f"{settings.runtime_dir}, socket paths of {length} bytes (limit 107)")
    finally:
        home.release()


def loopback_port(_: Settings) -> Finding:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return Finding("ok", f"bound 127.0.0.1:{server.getsockname()[1]}")


def locked_memory(_: Settings) -> Finding:
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("ok", "unlimited")
    if soft >= 64 << 10:
        return Finding("ok", f"{soft // 1024} KiB; zps itself locks nothing")
    return Finding("warn", f"{soft} bytes", "nothing: this version pins no memory")


def huge_pages(_: Settings) -> Finding:
    try:
        text = SHMEM_HUGE_PAGES.read_text()
    except OSError:
        return Finding("warn", "this kernel has none", "large models cost more TLB misses")
    chosen = text.partition("[")[2].partition("]")[0]
    if chosen in {"never", "deny"}:
        advice = f"as root: echo advise > {SHMEM_HUGE_PAGES} (faster with large models)"
        return Finding("warn", f"shared memory: {chosen}", advice)
    return Finding("ok", f"shared memory: {chosen}")


def messages(_: Settings) -> Finding:
    import zmq

    detail = f"pyzmq {zmq.__version__}, libzmq {zmq.zmq_version()}"
    missing = [feature for feature in ("ipc", "curve") if not zmq.has(feature)]
    if "ipc" in missing:
        return Finding("fail", f"{detail}, without ipc", "install pyzmq from its binary package")
    if missing:
        return Finding("warn", f"{detail}, without CURVE", "nothing: this version encrypts nothing")
    return Finding("ok", detail)


def torch_package(_: Settings) -> Finding:
    import torch

    version = str(torch.__version__)
    if torch.cuda.is_available():
        return Finding("ok", f"torch {version}, {torch.cuda.device_count()} CUDA devices")
    return Finding("ok", f"torch {version}, no CUDA device")


def cupy_package(_: Settings) -> Finding:
    for name in ("cupy-cuda12x", "cupy-cuda13x", "cupy"):
        try:
            return Finding("ok", f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return Finding("ok", "absent; this version does not use it")


def round_trip(settings: Settings) -> Finding:
    """A hub of our own, one worker, one small sum: everything at once, with a real answer."""
    import torch

    from zps.hub.process import HubProcess
    from zps.worker.worker import Worker

    own = Settings(runtime_dir=settings.runtime_dir, world_size=1, connect_timeout_s=5.0)
    times_ms = []
    with (
        HubProcess.start(own) as hub,
        Worker(hub.address, rank=0, world_size=1, settings=own) as worker,
    ):
        worker.declare({"x": torch.zeros(4)}, rule="sum")
        for _ in range(_ROUND_TRIPS):
            begin = time.perf_counter()
            value = torch.arange(4.0)
            worker.push_pull({"x": value}).wait(1.0)
            times_ms.append((time.perf_counter() - begin) * 1e3)
            if value.tolist() != [0.0, 1.0, 2.0, 3.0]:
                return Finding("fail", f"the sum over one worker came back as {value.tolist()}")
    return Finding("ok", f"{statistics.median(times_ms):.2f} ms, median of {_ROUND_TRIPS}")


#: Every check with what to do when it raises, in the order of the report.
CHECKS: dict[str, tuple[Callable[[Settings], Finding], str]] = {
    "native module": (
        native_module,
        "install again with a C++17 compiler at hand: pip install -e .",
    ),
    "sealed memory": (
        sealed_memory,
        "allow memfd_create and /proc in this container, or free memory",
    ),
    "ipc directory": (
        ipc_directory,
        "set ZPS_RUNTIME_DIR to a short, private, writable folder",
    ),
    "loopback port": (loopback_port, "bring up the loopback interface: ip link set lo up"),
    "locked memory": (locked_memory, ""),
    "huge pages": (huge_pages, ""),
    "messages": (messages, "install pyzmq"),
    "torch": (torch_package, "install torch"),
    "CuPy": (cupy_package, ""),
    "round trip": (round_trip, "the failed checks above come first; then ZPS_LOG_LEVEL=debug"),
}
