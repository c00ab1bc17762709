"""How names are chosen on the command line, and what is said of one that there is not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from .peers.base import BenchError


def nearest(name: str, known: Iterable[str], what: str) -> BenchError:
    """The error for a name that nobody has: what was meant, and what there is."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return BenchError(f"unknown {what} {name!r}{hint}: choose from {', '.join(names)}")
