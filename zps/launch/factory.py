"""A model by its name: `module.path:factory` or `script.py:Net`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from zps.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["load_model"]

#: The name a script is imported under: its own might be that of another module.
_SCRIPT = "__zps_model__"


def load_model(name: str) -> torch.nn.Module:
    """What the class or function that `name` names returns when it is called without arguments.

    name  "package.module:factory", looked up from the current folder too, or "path/script.py:Net";
          a script is run as an import, so that its `if __name__ == "__main__"` is not
    Raises ConfigError for what is not there, fails, or returns anything but a torch.nn.Module.
    """
    import torch

    where, colon, attribute = name.rpartition(":")
    if not colon or not where or not attribute:
        raise ConfigError(f"--model {name}: write it as module.path:factory or script.py:Net")
    module = _module(where)
    factory = _attribute(module, where, attribute)
    try:
        model = factory()
    except Exception as error:
        raise ConfigError(
            f"--model {name}: it failed with {type(error).__name__}: {error}. It is called without "
            "arguments: write a function that passes them"
        ) from error
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"--model {name}: it returned {type(model).__name__}, no nn.Module")
    return model


def _module(where: str) -> ModuleType:
    try:
        if where.endswith(".py"):
            return _script(Path(where))
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        return importlib.import_module(where)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"--model: {where} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def _script(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"--model: there is no script {str(path)!r}")
    spec = importlib.util.spec_from_file_location(_SCRIPT, path)
    assert spec is not None  # a file that ends in .py has a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # as for a script that is run
    sys.modules[_SCRIPT] = module  # where its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def _attribute(module: ModuleType, where: str, attribute: str) -> Callable[[], Any]:
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = get_close_matches(part, [n for n in dir(found) if not n.startswith("_")], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"--model: {where} has no {attribute!r}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"--model: {attribute!r} in {where} is neither a class nor a function")
    factory: Callable[[], Any] = found
    return factory
