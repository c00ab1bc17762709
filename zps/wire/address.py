"""The private directory in which a hub's ipc socket lives.

A second bind on one ipc path succeeds silently and steals the clients, so a hub first takes a lock
beside the socket. What a killed hub leaves there is swept by whoever notices: a lock that nobody
holds belongs to nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
from pathlib import Path

from zps.core.address import parse
from zps.errors import HubError

_SOCKET, _LOCK = "s", "lock"


def ipc_address(runtime_dir: Path, token: str) -> str:
    """Where the hub of the job `token` listens; any process that knows the token can tell."""
    address = f"ipc://{runtime_dir / token / _SOCKET}"
    parse(address)
    return address


class IpcHome:
    """A locked directory of this user alone, holding one hub's socket."""

    def __init__(self, path: Path, lock_fd: int):
        self.path = path
        self.address = ipc_address(path.parent, path.name)
        self._lock_fd = lock_fd

    @classmethod
    def claim(cls, runtime_dir: Path, token: str | None = None) -> IpcHome:
        """Take the home `token`, or a fresh one. Raises HubError when another hub lives there."""
        ensure_private(runtime_dir)
        sweep(runtime_dir)
        for _ in range(8):
            path = runtime_dir / (token or f"{os.getpid()}-{secrets.token_hex(4)}")
            ipc_address(runtime_dir, path.name)
            with contextlib.suppress(FileExistsError):  # exist_ok fails if it vanishes now
                path.mkdir(mode=0o700)
            try:
                lock_fd = _lock(path)
            except FileNotFoundError:
                continue  # swept between the two steps
            if lock_fd is not None:
                (path / _SOCKET).unlink(missing_ok=True)
                return cls(path, lock_fd)
            if token is not None:
                raise HubError(
                    f"another hub already serves {path}; end it, or use another job name"
                )
        raise HubError(f"cannot take a directory for the hub's socket in {runtime_dir}")

    def release(self) -> None:
        """Remove the socket and the directory."""
        if self._lock_fd >= 0:
            _remove(self.path)
            os.close(self._lock_fd)
            self._lock_fd = -1


def ensure_private(directory: Path) -> None:
    """Make `directory` (mode 0700); raises HubError when it belongs to, or is open to, others."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = directory.lstat()
    except OSError as error:
        raise HubError(
            f"cannot make the directory {directory}: {error.strerror}. "
            "Set ZPS_RUNTIME_DIR to another place"
        ) from error
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise HubError(
            f"{directory} must be a directory of yours alone: run `chmod 700 {directory}`, "
            "or set ZPS_RUNTIME_DIR to another place"
        )


def sweep(runtime_dir: Path) -> None:
    """Remove the homes of hubs that are no more."""
    for home in runtime_dir.glob(f"*/{_LOCK}"):
        sweep_home(home.parent)


def sweep_home(home: Path) -> None:
    """Remove one home unless a living hub holds its lock."""
    try:
        lock_fd = _lock(home, create=False)
    except OSError:
        return
    if lock_fd is not None:
        _remove(home)
        os.close(lock_fd)


def home_of(address: str) -> Path | None:
    """The home that an ipc address points into, None for other addresses."""
    scheme, rest = parse(address)
    path = Path(rest)
    return path.parent if scheme == "ipc" and path.name == _SOCKET else None


def _lock(home: Path, *, create: bool = True) -> int | None:
    path = home / _LOCK
    lock_fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A sweeper may have removed the file between open and lock: then the lock guards nothing.
        if os.fstat(lock_fd).st_ino == path.stat().st_ino:
            return lock_fd
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock_fd)
    return None


def _remove(home: Path) -> None:
    for name in (_SOCKET, _LOCK):
        (home / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody keeps a file of their own there
        home.rmdir()
