"""Where a hub listens, as people write it: `ipc:///path/to/socket` or `tcp://host:port`."""

from __future__ import annotations

import os
import re

from zps.errors import ConfigError

__all__ = ["parse", "split"]

_MAX_IPC_PATH = 107  # sun_path, less its terminator
_MAX_PORT = 65535
_PORT = re.compile(r"[0-9]{1,5}")
_FORMS = "write ipc:///path/to/socket or tcp://host:port"


def split(text: str) -> tuple[str, ...]:
    """The addresses in a comma-separated list, each checked; blanks beside a comma are ignored.

    Raises ConfigError naming the part that is wrong. An empty place between commas, or at an end,
    is an error: it may be a variable that was not set, and a hub too few is another job.
    """
    found = [item.strip() for item in text.split(",")]
    for number, address in enumerate(found):
        if not address:
            raise ConfigError(
                f"address {number + 1} of {len(found)} is empty; there is a comma too many, or an "
                "address is missing"
            )
        parse(address)
    return tuple(found)


def parse(address: str) -> tuple[str, str]:
    """(scheme, rest) of one address. Raises ConfigError naming the part that is wrong."""
    scheme, separator, rest = address.partition("://")
    if not separator or scheme not in ("ipc", "tcp"):
        raise _wrong(address, "it begins with neither ipc:// nor tcp://")
    if "://" in rest:
        raise _wrong(address, "it is two addresses; separate them by a comma")
    if scheme == "ipc":
        _check_path(address, rest)
    else:
        _check_host_and_port(address, rest)
    return scheme, rest


def _check_path(address: str, path: str) -> None:
    if not path.startswith("/"):
        raise _wrong(address, f"the path {path!r} does not begin with /")
    nbytes = len(os.fsencode(path))
    if nbytes > _MAX_IPC_PATH:
        raise ConfigError(
            f"ipc path {path!r} has {nbytes} bytes; the system allows {_MAX_IPC_PATH}. "
            "Set ZPS_RUNTIME_DIR to a shorter directory."
        )


def _check_host_and_port(address: str, rest: str) -> None:
    if any(character.isspace() for character in rest):
        raise _wrong(address, "there is a blank in it")
    host, colon, port = rest.rpartition(":")
    if not colon or rest.endswith("]"):  # the colons of an IPv6 address stand in brackets
        raise _wrong(address, "it has no port")
    if not host:
        raise _wrong(address, "its host is empty")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise _wrong(address, f"the host {host!r} has a colon in it; an IPv6 host is in brackets")
    if not _PORT.fullmatch(port) or not 1 <= int(port) <= _MAX_PORT:
        raise _wrong(address, f"the port {port!r} is no number from 1 to {_MAX_PORT}")


def _wrong(address: str, what: str) -> ConfigError:
    return ConfigError(f"hub address {address!r} cannot be read: {what}; {_FORMS}")
