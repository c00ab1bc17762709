"""Fixtures for tests with real hubs and workers: see tests/workers.py."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

if TYPE_CHECKING:
    from tests.workers import Crew


@pytest.fixture(scope="session")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    """Worker processes and hubs, started when first needed, and ended with the session."""
    from tests.workers import Crew  # tests that need no worker do not pay for torch

    crew = Crew(tmp_path_factory.mktemp("zps"))
    yield crew
    crew.stop()


@pytest.fixture(autouse=True)
def link(request: pytest.FixtureRequest) -> Iterator[str]:
    """How workers reach their hub; the tests of a module with `LINKS` run over all of them."""
    name = getattr(request, "param", None)
    if name is None:
        yield "auto"
        return
    from tests import workers

    with mock.patch.object(workers, "LINK", name):
        yield name


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    links = getattr(metafunc.module, "LINKS", ())
    if links:
        metafunc.parametrize("link", links, indirect=True)


@pytest.fixture
def run(crew: Crew) -> Any:
    """`run(body, *args, world=2, hub={...}, **kwargs)`: see Crew.run."""
    return crew.run


@pytest.fixture(scope="session", autouse=True)
def heeded_signals() -> None:
    """Children inherit ignored signals, and a test run in the background ignores some."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, None)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler or signal.SIG_DFL)
