"""A coordinator as `fedpeft watch` follows it: its sites, and its newest runs as they come."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from fedpeft.errors import InputError, RunError

MOST_RUNS = 4  # of a coordinator, the newest; an older one is watched by its own folder
POLL_S = 5.0  # between two questions to the coordinator, however many pages are open


class Fleet:
    """One coordinator's folder.

    Raises:
        InputError: the folder is no coordinator's.
    """

    def __init__(self, path: Path) -> None:
        from fedpeft.deploy import settings

        self.server = settings.server(path)
        self.path = self.server.path
        # The first look asks at once.
        self._asked = -POLL_S
        self._state: dict[str, Any] = {}

    @staticmethod
    def is_at(path: Path) -> bool:
        """Whether there is a coordinator's folder."""
        return Path(os.path.expanduser(path), "server.yaml").is_file()

    def runs(self) -> list[Path]:
        """Folders of the newest runs, newest first."""
        return self.server.all_runs()[: -MOST_RUNS - 1 : -1]

    def state(self) -> dict[str, Any]:
        """Whether it runs, and each site: `status` (online, offline, unknown) and, in unix seconds, `online_until`."""
        if time.monotonic() - self._asked >= POLL_S:
            self._state, self._asked = self._ask_coordinator(), time.monotonic()
        return self._state

    def _ask_coordinator(self) -> dict[str, Any]:
        from fedpeft.deploy.coordinator import server

        about: dict[str, Any] = {"path": str(self.path), "runs": len(self.server.all_runs()), "problem": ""}
        try:
            return {**about, **server.sites(self.path)}
        except (RunError, InputError, OSError) as error:  # it begins or ends just now
            rows = [{"name": name, "status": "unknown", "online_until": None} for name in self.server.sites()]
            return {**about, "running": False, "problem": str(error), "sites": rows}
