"""A node hub as a process: as a hub's, but it says hello upstream before it serves anybody."""

from __future__ import annotations

from functools import partial
from typing import Any

from zps.config import Settings
from zps.hub import process
from zps.hub.hub import Hub
from zps.hub.process import HubProcess
from zps.relay.hub import NodeHub
from zps.relay.upstream import Upstream
from zps.wire.sockets import Router

_MODULE = "zps.relay.process"


def at_home(settings: Settings) -> Settings:
    """What the workers of a node hub are told: what travels further is encoded there, not here."""
    return settings.replace(node_hub=False, compression="none", pull_compression="none")


def start(settings: Settings, **options: Any) -> HubProcess:
    """`HubProcess.start` for a node hub; settings are as `Upstream` wants them."""
    return HubProcess.start(settings, module=_MODULE, **options)


def run(settings: Settings, **options: Any) -> None:
    """`zps.hub.process.run` for a node hub. Raises also what `Upstream` does."""
    upstream = Upstream(settings)
    try:
        process.run(settings, make_hub=partial(_make, upstream), **options)
    finally:
        upstream.close()


def _make(upstream: Upstream, settings: Settings, router: Router, **options: Any) -> Hub:
    del options["resolve_rule"]  # rules run upstream
    return NodeHub(settings, router, upstream=upstream, **options)


if __name__ == "__main__":
    process.main(run)
