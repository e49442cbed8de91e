"""``python -m monitor_cli`` is ``monitor``."""

from __future__ import annotations

from monitor_cli.app import main

if __name__ == "__main__":
    main()
