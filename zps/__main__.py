"""`python -m zps` is `zps`."""

from __future__ import annotations

from zps.cli import main

if __name__ == "__main__":
    main()
