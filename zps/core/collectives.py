"""What workers do together: nobody is answered before everybody has asked."""

from __future__ import annotations

from collections.abc import Collection, Iterator

__all__ = ["Collectives"]


class Collectives:
    """Collectives by name, each begun anew once it is complete."""

    def __init__(self, *names: str) -> None:
        self._asked: dict[str, dict[int, int]] = {name: {} for name in names}

    def ask(self, name: str, rank: int, seq: int) -> None:
        """`rank` has come to the collective, by its request `seq`; a later one replaces it."""
        self._asked[name][rank] = seq

    def leave(self, rank: int) -> None:
        """`rank` is gone, and its requests with it."""
        for asked in self._asked.values():
            asked.pop(rank, None)

    def complete(self, needed: Collection[int]) -> Iterator[tuple[str, dict[int, int]]]:
        """Each collective that has begun and that all of `needed` have come to: its name, and
        everybody's request."""
        for name, asked in self._asked.items():
            if asked and asked.keys() >= set(needed):
                self._asked[name] = {}
                yield name, asked

    def came(self, name: str) -> tuple[int, ...]:
        """The ranks that have come to it, ascending."""
        return tuple(sorted(self._asked[name]))

    def awaited(self, needed: Collection[int]) -> set[int]:
        """Those of `needed` for whom a collective that has begun waits."""
        return {
            rank for asked in self._asked.values() if asked for rank in needed if rank not in asked
        }
