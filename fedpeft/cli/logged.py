"""What modules log, on standard error: a warning that comes again is counted, not printed again.

Warnings are the same that say the same of the same client; the round or task that they begin with makes no other.

    >>> apart("round 3: client-001 quarantined: B has NaN")
    ('round 3', 'client-001 quarantined: B has NaN')
    >>> apart("nothing is kept")
    ('', 'nothing is kept')
"""

from __future__ import annotations

import logging
import re

from fedpeft.cli import console

STYLES = {"WARNING": "yellow", "ERROR": "bold red", "CRITICAL": "bold red"}


class Logged(logging.Handler):
    """A line for each record; of a warning the first only, until `sum_up` says how many more there were.

    Args:
        resident: the command is a service, whose log has to have each time that something happened.
    """

    def __init__(self, resident: bool = False) -> None:
        super().__init__()
        self.resident = resident
        self.again: dict[str, int] = {}  # times after the first
        self.last: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        at, what = apart(text)
        if record.levelno >= logging.WARNING and not self.resident:
            if what in self.again:
                self.again[what] += 1
                self.last[what] = at
                return
            self.again[what] = 0
        console.logged(record.levelname, text, STYLES.get(record.levelname, ""))

    def sum_up(self) -> None:
        """Say how often each warning has come again; once."""
        for what, times in self.again.items():
            if times:
                where = f", last in {self.last[what]}" if self.last[what] else ""
                console.logged("WARNING", f"{times} more times{where}: {what}", STYLES["WARNING"])
        # A progress bar sums up when it ends, and `main` once more for what came after.
        self.again = {}


def apart(text: str) -> tuple[str, str]:
    """The round or task that a text begins with, and what it says."""
    found = re.match(r"((?:round|task) \d+): ", text)
    return (found[1], text[found.end() :]) if found else ("", text)


def sum_up() -> None:
    """Of the command at work."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, Logged):
            handler.sum_up()
