"""Fixtures for tests with real hubs and workers: see tests/workers.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

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


@pytest.fixture
def run(crew: Crew) -> Any:
    """`run(body, *args, world=2, hub={...}, **kwargs)`: see Crew.run."""
    return crew.run
