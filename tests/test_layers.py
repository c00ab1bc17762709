"""Imports only go down the list of rooms: a room knows itself and what is below it.

Every import counts, also those inside functions and under TYPE_CHECKING: a name that is only used
for typing is a dependency all the same.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the top to the bottom. Rooms on one line do not know each other.
LEVELS = (
    ("zps",),
    ("cli",),
    ("tuning",),
    ("launch",),
    ("monitor",),
    ("training",),
    ("relay",),
    ("worker", "hub"),
    ("optim",),
    ("wire",),
    ("memory",),
    ("config",),
    ("codec",),
    ("core",),
    ("native",),
    ("trace",),
    ("errors",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
SAME_ROOM = {"__init__": "zps", "__main__": "cli", "_core": "native", "_cuda": "native"}

# Modules looked up by name at run time, from below: each with its reason.
BY_NAME = {
    # A rule without a kernel runs as its torch class; a hub that needs none never imports torch.
    ("zps/hub/process.py", "zps.training.torch_rules"),
}


def room_of(module: str) -> str:
    """The room of a dotted name: "zps.hub.store" -> "hub"."""
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else "__init__"
    return SAME_ROOM.get(name, name)


def module_of(path: str) -> str:
    """The dotted name of a file: "zps/hub/store.py" -> "zps.hub.store"."""
    return path.removesuffix(".py").replace("/", ".")


def imports_of(path: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import of zps in a file, wherever in the file it is."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module_of(path).split(".")[: -node.level]
                base = ".".join([*here, base] if base else here)
            if base == "zps":  # the names may be rooms
                for alias in node.names:
                    yield node.lineno, f"zps.{alias.name}"
            else:
                yield node.lineno, base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def violations_of(path: str, source: str) -> list[str]:
    """What a file must not import, one sentence each."""
    room = room_of(module_of(path))
    found = []
    for line, module in imports_of(path, source):
        if module.split(".")[0] != "zps" or (path, module) in BY_NAME:
            continue
        other = room_of(module)
        if other not in LEVEL:
            found.append(f"{path}:{line} imports {module}, which is in no room")
        elif other != room and LEVEL[other] <= LEVEL[room]:
            found.append(f"{path}:{line} imports {module}: {room} does not know {other}")
    return found


FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "zps").rglob("*.py"))


def test_every_file_is_in_a_room() -> None:
    assert len(FILES) > 10
    assert [path for path in FILES if room_of(module_of(path)) not in LEVEL] == []


@pytest.mark.parametrize("path", FILES)
def test_imports_only_go_down(path: str) -> None:
    assert violations_of(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize("path", FILES)
def test_only_native_touches_the_compiled_modules(path: str) -> None:
    compiled = {"zps._core", "zps._cuda"}
    imported = {module for _, module in imports_of(path, (ROOT / path).read_text())}
    assert path.startswith("zps/native/") or not imported & compiled


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("zps/core/rounds.py", "import zps.hub.store"),
        ("zps/core/rounds.py", "from zps.memory.segment import Segment"),
        ("zps/core/rounds.py", "from zps import memory"),
        ("zps/core/rounds.py", "from .. import memory"),
        ("zps/core/rounds.py", "from ..memory.segment import Segment"),
        ("zps/core/rounds.py", "def f():\n    import zps.wire"),
        ("zps/core/rounds.py", "if TYPE_CHECKING:\n    from zps.wire import messages"),
        ("zps/core/rounds.py", "importlib.import_module('zps.wire.messages')"),
        ("zps/core/rounds.py", "import zps"),
        ("zps/core/rounds.py", "from zps import Optimizer"),
        ("zps/hub/hub.py", "from zps.worker.link import Link"),
        ("zps/worker/worker.py", "from zps.hub.store import Store"),
        ("zps/hub/hub.py", "from zps.relay.upstream import Upstream"),
        ("zps/hub/store.py", "importlib.import_module('zps.training.torch_rules')"),
        ("zps/errors.py", "from zps.config import Settings"),
        ("zps/launch/local.py", "from zps.cli import main"),
        ("zps/native/words.py", "from zps.lost import found"),
        ("zps/codec/spec.py", "from zps.config import Settings"),
        ("zps/core/layout.py", "from zps.codec.plan import Plan"),
    ],
)
def test_an_import_that_goes_up_is_found(path: str, source: str) -> None:
    assert len(violations_of(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("zps/core/rounds.py", "import math, torch\nfrom zps.errors import ZpsError"),
        ("zps/core/rounds.py", "from zps.core.layout import Layout\nfrom . import layout"),
        ("zps/hub/hub.py", "from zps.core.rounds import Rounds\nfrom zps import native"),
        ("zps/native/words.py", "from zps import _core\nfrom zps.errors import UsageError"),
        ("zps/config.py", "from zps.codec.spec import Compression"),
        ("zps/codec/plan.py", "from zps.core.layout import Layout"),
        ("zps/__main__.py", "from zps.cli import main"),
        ("zps/__init__.py", "from zps.training.optimizer import Optimizer"),
    ],
)
def test_an_import_that_goes_down_is_allowed(path: str, source: str) -> None:
    assert violations_of(path, source) == []


def test_the_package_loads_nothing_of_its_own_at_import() -> None:
    loaded = _modules_after("import zps")
    assert {module for module in loaded if module.startswith("zps.")} <= {"zps.errors"}


def test_a_hub_never_imports_torch() -> None:
    rooms = ("/hub/", "/relay/")
    hub = [
        module_of(path).removesuffix(".__init__")
        for path in FILES
        if any(room in path for room in rooms)
    ]
    loaded = _modules_after(f"import {', '.join(hub)}")
    assert "zps.hub" in loaded
    assert "torch" not in loaded


def test_settings_and_codecs_never_import_torch() -> None:
    rooms = ("/codec/", "/config.py")
    paths = [path for path in FILES if any(room in f"/{path}" for room in rooms)]
    loaded = _modules_after(
        f"import {', '.join(module_of(path).removesuffix('.__init__') for path in paths)}"
    )
    assert {"zps.codec", "zps.config"} <= loaded
    assert "torch" not in loaded


def _modules_after(statement: str) -> set[str]:
    """The names in sys.modules once a fresh interpreter has run one statement."""
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())
