"""Rounds on hold over several hubs: what each hub has measured is added up here, and sent to all.

A round on hold ends for all hubs alike, but each sees a part of the gradient. So every hub tells
the workers what it knows (PARTIAL), and a worker that has heard all of them decides (VERDICT). In
bsp each worker may, and the first one counts: any of them may be the only one left. It happens in
whatever wait a worker is in, as nobody's wait ends before.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import partial

from zps.core.rounds import MAX_AHEAD
from zps.wire import messages as m
from zps.worker.channel import Channel

_SLICE_S = 0.1  # how long Ctrl-C and a dead hub may go unnoticed


class Verdicts:
    """What the hubs of one worker have asked, in the order of the hubs.

    bsp  a hub that has closed a round without asking has nothing of it on hold
    """

    def __init__(self, channels: Sequence[Channel], *, bsp: bool):
        self._channels = channels
        self._bsp = bsp
        self._lock = threading.Lock()
        self._heard: dict[int, dict[int, m.Partial]] = {}  # round -> hub -> what it knows
        for hub, channel in enumerate(channels):
            channel.session.heed = partial(self._heed, hub)
            channel.session.attend = self.attend
            others = [c.session for c in channels if c is not channel and c.link.private]
            channel.session.neighbours = others

    def attend(self) -> bool:
        """Decide what can be decided; True if there is more, whose hubs have been waited for.

        Raises HubLost when any of the hubs has ended: a wait for another might never end.
        """
        for channel in self._channels:
            channel.session.check_alive()
            if self._heard or channel.link.private:  # a hub may ask for gradients
                channel.link.listen(0.0)
        if not self._heard:
            return False
        missing = self._decide()
        if missing is None:
            return False
        missing.link.listen(_SLICE_S)
        return self._decide() is not None

    def poll(self) -> None:
        """Decide what can be decided now, for who does not wait."""
        for channel in self._channels:
            channel.link.listen(0.0)
        self._decide()

    def _heed(self, hub: int, told: m.Partial) -> None:
        with self._lock:
            self._heard.setdefault(told.round, {})[hub] = told
            for round_ in [r for r in self._heard if r < told.round - MAX_AHEAD]:
                del self._heard[round_]  # it was decided without us

    def _decide(self) -> Channel | None:
        """Send the verdicts on all rounds of which every hub was heard; else a hub that was not."""
        unheard = None
        for round_ in sorted(self._heard):
            silent = [c for hub, c in enumerate(self._channels) if not self._has_said(hub, round_)]
            if silent:
                unheard = unheard or silent[0]
                continue
            with self._lock:
                heard = self._heard.pop(round_, None)  # another thread may have been faster
            if heard is not None:
                self._send(round_, [heard[hub] for hub in sorted(heard)])
        return unheard

    def _has_said(self, hub: int, round_: int) -> bool:
        if hub in self._heard.get(round_, ()):
            return True
        link = self._channels[hub].link
        if not self._bsp or int(link.closed_rounds.min()) <= round_:
            return False
        link.listen(0.0)  # it speaks before it closes
        return True

    def _send(self, round_: int, heard: Sequence[m.Partial]) -> None:
        norm_sq = sum(told.norm_sq for told in heard)
        finite = all(told.finite for told in heard) and math.isfinite(norm_sq)
        for channel in self._channels:
            session = channel.session
            with session.sequenced() as seq:
                session.send(
                    m.Verdict(
                        **session.header(seq),
                        round=round_,
                        norm_sq=norm_sq if finite else 0.0,
                        finite=finite,
                    )
                )
