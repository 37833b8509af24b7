"""Signs of life: a command that works in silence says at least every 30 s how far it has come, where nobody sees a bar.

    simulate: round 4 of 20, 12 of 40 clients, 0.8 clients/s; 3 min so far, about 15 min left

It is one thread for all commands, started by `main`. What it says follows from the steps that the work tells
(`fedpeft.progress`): the end is reckoned from the outermost level that has come forward since it was first heard of, so
what a resumed run had done before counts as nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fedpeft import progress
from fedpeft.record.words import number, show_duration

EVERY_S = 30.0
# Services: they run until they are stopped, and their logs, or their page, say what happens.
RESIDENT = ("server start", "site start", "watch")
_current: list[SignOfLife] = []


@dataclass
class Level:
    """Steps of one level: `done` of `total`, of which `before` were done at `since`, when it was first heard of."""

    done: int
    total: int
    before: int
    since: float


class SignOfLife:
    """What is known of a command at work, and when it last said something.

    Args:
        name: of the command.
        clock: seconds.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.clock = name, clock
        self.begun = self.spoke = clock()
        self.levels: dict[str, Level] = {}

    def step(self, level: str, done: int, total: int) -> None:
        """Hear how far a level has come (`progress.Listener`)."""
        known = self.levels.get(level)
        if known is None or done == 0 or total != known.total:
            inner = progress.LEVELS[progress.LEVELS.index(level) :]
            kept = {name: value for name, value in self.levels.items() if name not in inner}
            self.levels = {**kept, level: Level(done, total, done, self.clock())}
        elif done > known.done:
            known.done = done

    def until_due(self, every_s: float) -> float:
        """Seconds until something has to be said, if nothing was said for `every_s`; 0 when it is due."""
        return max(0.0, self.spoke + every_s - self.clock())

    def line(self) -> str:
        """Where the work stands: levels, rate of the innermost, time so far and time left."""
        now, levels = self.clock(), self.levels
        parts = []
        for name in progress.LEVELS:
            if (level := levels.get(name)) is not None:
                at = f"round {min(level.done + 1, level.total)}" if name == "rounds" else f"{level.done}"
                parts.append(f"{at} of {level.total}" + ("" if name == "rounds" else f" {name}"))
        rate = self.rate(now)
        if rate:
            parts.append(rate)
        times = [f"{show_duration(now - self.begun)} so far"]
        left = self.left(now)
        if left is not None:
            times.append(f"about {show_duration(left)} left")
        return f"{self.name}: {', '.join(parts or ['at work'])}; {', '.join(times)}"

    def rate(self, now: float) -> str:
        """Of the innermost level that has come forward, in a second or a minute."""
        for name in reversed(progress.LEVELS):
            level = self.levels.get(name)
            if level is not None and level.done > level.before and now > level.since:
                each_s = (level.done - level.before) / (now - level.since)
                return f"{number(each_s)} {name}/s" if each_s >= 0.1 else f"{number(60 * each_s)} {name}/min"
        return ""

    def left(self, now: float) -> float | None:
        """Seconds until the outermost level is at its end; None while nothing of it is done."""
        inside, came, outermost = 0.0, 0.0, None
        for name in reversed(progress.LEVELS):
            level = self.levels.get(name)
            if level is not None and level.total:
                outermost, came = level, level.done + inside - level.before
                inside = min(1.0, (level.done + inside) / level.total)
        if outermost is None or came <= 0:
            return None
        return max(0.0, (outermost.total - outermost.before - came) * (now - outermost.since) / came)


@contextmanager
def watched(name: str, say: Callable[[str], None], every_s: float | None = None) -> Iterator[None]:
    """While the command `name` works, `say` where it stands whenever nothing was said for `every_s` (EVERY_S)."""
    if name in RESIDENT:
        yield
        return
    sign, ended = SignOfLife(name), threading.Event()
    pause_s = EVERY_S if every_s is None else every_s

    def speak() -> None:
        while not ended.wait(sign.until_due(pause_s)):
            # Something else may have been said while this one waited.
            if not sign.until_due(pause_s):
                sign.spoke = sign.clock()
                say(sign.line())

    thread = threading.Thread(target=speak, name="sign of life", daemon=True)
    _current.append(sign)
    with progress.heard_by(sign.step):
        thread.start()
        try:
            yield
        finally:
            ended.set()
            # So that no sign of life comes after the command's last line.
            thread.join()
            _current.remove(sign)


def spoke() -> None:
    """Whoever looks has just seen a line of another kind."""
    for sign in _current:
        sign.spoke = sign.clock()
