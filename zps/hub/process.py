"""A hub as a process: how it starts, says that it is ready, and never outlives its parent."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import ipaddress
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import IO, Any

import zmq

from zps.config import CONFIG_VARIABLE, Settings
from zps.core.address import parse
from zps.errors import ConfigError, HubUnreachable, ZpsError
from zps.hub.hub import Hub
from zps.hub.store import ForeignFactory
from zps.memory.heap import keep_freed_memory
from zps.optim import registry
from zps.optim.base import Rule
from zps.wire.address import IpcHome, home_of, sweep_home
from zps.wire.sockets import Router, readable

log = logging.getLogger("zps.hub")

_START_S = 30.0
_IO_THREADS = 2  # one copies about as fast as one link of 10 Gb/s brings
_MIN_FRAME_BYTES = 16 << 20  # room for a large model's layout


def run(
    settings: Settings,
    *,
    bind: str | None = None,
    token: str | None = None,
    parent_pid: int | None = None,
    on_event: Callable[..., None] = lambda *_, **__: None,
    make_hub: Callable[..., Hub] = Hub,
) -> None:
    """Serve in this process until SIGTERM, Ctrl-C, or the death of `parent_pid`.

    bind      `tcp://HOST:PORT`, beyond this machine only with `insecure`; None: an ipc socket in a
              private directory, named by `token`
    make_hub  called as `Hub` is
    Raises ConfigError, HubError, OutOfMemory before anything is served.
    """
    home = None
    if bind is None:
        home = IpcHome.claim(settings.runtime_dir, token)
        bind = home.address
    else:
        _check_bind(bind, insecure=settings.insecure)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=_IO_THREADS)
    try:
        router = Router(context, bind, max(2 * settings.bucket_bytes, _MIN_FRAME_BYTES))
        resolver = RuleResolver(settings)
        hub = make_hub(settings, router, resolve_rule=resolver, on_event=on_event)
        _stop_on_signals(hub, ignore_interrupt=parent_pid is not None)
        if parent_pid is not None:
            _stop_with_parent(hub, parent_pid)
        log.info("serving at %s", bind)
        on_event("ready", address=bind)
        hub.run()
    finally:
        if home is not None:
            home.release()
        context.destroy(linger=0)  # also after a start that failed half-way


class RuleResolver:
    """From a rule's name to our kernels, or to a torch class that this hub may run."""

    def __init__(self, settings: Settings):
        self._allowed = frozenset(settings.optimizer_classes)

    def __call__(self, name: str) -> Rule | ForeignFactory:
        """Raises ConfigError for a name that is neither ours nor allowed."""
        if "." not in name:
            return registry.rule(name)
        if not name.startswith("torch.optim.") and name not in self._allowed:
            raise ConfigError(
                f"this hub may not run {name!r}: start it with ZPS_OPTIMIZERS={name}, "
                "or use a class of torch.optim"
            )
        # Only now, and only here: a hub that runs native rules never pays for importing torch.
        rules = importlib.import_module("zps.training.torch_rules")
        factory: ForeignFactory = rules.factory(name)
        return factory


class HubProcess:
    """A hub in a child process. It ends with its parent, however the parent ends."""

    def __init__(self, popen: subprocess.Popen[bytes], status_fd: int):
        self.popen = popen
        self.address = ""
        self._owner = os.getpid()
        self._status_fd = status_fd
        self._unread = b""
        self._events: list[dict[str, Any]] = []

    @classmethod
    def start(
        cls,
        settings: Settings,
        *,
        bind: str | None = None,
        token: str | None = None,
        stderr: int | IO[bytes] | None = None,
        module: str = "zps.hub.process",
    ) -> HubProcess:
        """Start a hub and wait until it serves; raises HubUnreachable with its reason.

        module  what to run: its `main` is this module's
        """
        env = {name: value for name, value in os.environ.items() if not name.startswith("ZPS_")}
        own = {"rank": None} if settings.node_hub else {"rank": None, "hub": None}
        env |= settings.replace(**own).to_env()
        env[CONFIG_VARIABLE] = os.devnull  # all that counts is in `settings`, whatever lies about
        read_fd, write_fd = os.pipe()
        command = [sys.executable, "-m", module, "--status-fd", str(write_fd)]
        command += ["--parent", str(os.getpid())]
        command += ["--bind", bind] if bind else []
        command += ["--token", token] if token else []
        try:
            popen = subprocess.Popen(
                command,
                env=env,
                pass_fds=[write_fd],
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,  # signals of the terminal are for its parent
            )
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        process = cls(popen, read_fd)
        try:
            ready = process._wait_for("ready", _START_S)
        except BaseException:
            process.stop()
            raise
        if ready is None:
            failed = next((e for e in process._events if e["event"] == "failed"), None)
            process.stop()
            reason = failed["text"] if failed else f"it ended with code {popen.poll()}"
            raise HubUnreachable(f"the hub did not start: {reason}")
        process.address = str(ready["address"])
        return process

    @property
    def pid(self) -> int:
        return self.popen.pid

    def poll(self) -> int | None:
        """Exit code, or None while it runs."""
        return self.popen.poll()

    def formed(self) -> bool:
        """Whether all workers have joined once; does not wait."""
        return self._wait_for("formed", 0.0) is not None

    def wait_finished(self, timeout_s: float) -> bool:
        """Wait until every worker of a job that has formed has left; True at once without one."""
        return not self.formed() or self._wait_for("finished", timeout_s) is not None

    @property
    def owned_here(self) -> bool:
        """Whether this process started it; a forked child of that process did not."""
        return os.getpid() == self._owner

    def stop(self, timeout_s: float = 5.0) -> None:
        """End it, by force after `timeout_s`, and remove what it may have left."""
        if self.popen.poll() is None:
            self.popen.terminate()
            try:
                self.popen.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.popen.kill()
        self.popen.wait()
        if self._status_fd >= 0:
            os.close(self._status_fd)
            self._status_fd = -1
        home = home_of(self.address) if self.address else None
        if home is not None:
            sweep_home(home)

    def __enter__(self) -> HubProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_for(self, event: str, timeout_s: float) -> dict[str, Any] | None:
        deadline = time.monotonic() + timeout_s
        while True:
            for seen in self._events:
                if seen["event"] == event:
                    return seen
            left = max(0.0, deadline - time.monotonic())
            if self._status_fd < 0 or not readable(self._status_fd, left):
                return None
            data = os.read(self._status_fd, 65536)
            if not data:  # it has ended
                os.close(self._status_fd)
                self._status_fd = -1
                self.popen.wait()
                return None
            *lines, self._unread = (self._unread + data).split(b"\n")
            self._events += [json.loads(line) for line in lines]


def _check_bind(address: str, *, insecure: bool) -> None:
    scheme, rest = parse(address)
    host = rest.rpartition(":")[0].strip("[]")
    if scheme != "tcp" or _is_loopback(host):
        return
    if not insecure:
        raise ConfigError(
            f"{address} is not a loopback address, and this version has no encryption: whoever "
            "reaches it may join, read and write the model. Bind to 127.0.0.1, leave --bind out, "
            "or say ZPS_INSECURE=true on a network that you trust"
        )
    log.warning("%s is open to whoever reaches it: nothing is encrypted (ZPS_INSECURE)", address)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, or * for every address
        return False


def _stop_on_signals(hub: Hub, *, ignore_interrupt: bool) -> None:
    # A handler may run anywhere, so it only stores the reason; the pipe wakes the loop.
    left, right = socket.socketpair()
    for end in (left, right):
        end.setblocking(False)
    signal.set_wakeup_fd(right.fileno(), warn_on_full_buffer=False)
    # Ctrl-C reaches the whole foreground group: a child hub leaves it to its parent.
    interrupt = signal.SIG_IGN if ignore_interrupt else lambda *_: hub.stop("the hub was stopped")
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, lambda *_: hub.stop("the hub was stopped"))

    def drain() -> None:
        left.recv(4096)
        assert right.fileno() >= 0  # keeps the pair open as long as the watch

    hub.watch(left.fileno(), drain)


def _stop_with_parent(hub: Hub, parent_pid: int) -> None:
    try:
        parent = os.pidfd_open(parent_pid)
    except ProcessLookupError:
        hub.stop("its parent has ended")
        return
    if os.getppid() != parent_pid:  # it died before we looked, and the number was given away
        hub.stop("its parent has ended")
    hub.watch(parent, lambda: hub.stop("its parent has ended"))


def main(serve: Callable[..., None] = run) -> None:
    """A hub's life in a process of its own; `serve` is called as `run` is."""
    parser = argparse.ArgumentParser(description="Serve one zps hub (started by zps itself).")
    parser.add_argument("--status-fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--bind")
    parser.add_argument("--token")
    args = parser.parse_args()
    os.set_inheritable(args.status_fd, False)

    def tell(event: str, **facts: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # the parent has ended, and so shall we
            os.write(args.status_fd, json.dumps({"event": event, **facts}).encode() + b"\n")

    keep_freed_memory()
    try:
        settings = Settings.load()
        configure_logging(settings, quiet=True)
        serve(settings, bind=args.bind, token=args.token, parent_pid=args.parent, on_event=tell)
    except ZpsError as error:
        tell("failed", text=str(error))
        raise SystemExit(f"zps hub: {error}") from None


def configure_logging(settings: Settings, *, quiet: bool) -> None:
    """One line a message on stderr; `quiet` leaves out what is not for a script's user."""
    level = "warning" if quiet and settings.log_level == "info" else settings.log_level
    logging.basicConfig(level=level.upper(), format="zps hub: %(message)s")


if __name__ == "__main__":
    main()
