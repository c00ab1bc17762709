"""A launcher without a hub, for tests that send it signals: `driver.py '{"workers": [CODE, …]}'`.

Workers are Python code, one a rank. Prints what the launcher says to standard error.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from zps.launch.supervise import Job, Spec, Supervisor


class PretendHub:
    pid = 1

    def __init__(self, formed: bool) -> None:
        self._formed = formed

    def formed(self) -> bool:
        return self._formed

    def poll(self) -> int | None:
        return None


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored when tests run with `&`
    request = json.loads(sys.argv[1])
    workers = [
        Spec(rank, [sys.executable, "-u", "-c", code], dict(os.environ))
        for rank, code in enumerate(request["workers"])
    ]
    job = Job(workers, PretendHub(request.get("formed", True)), grace_s=request.get("grace_s", 60))
    return Supervisor(job, say=lambda text: print(text, file=sys.stderr, flush=True)).run()


if __name__ == "__main__":
    sys.exit(main())
