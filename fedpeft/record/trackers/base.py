"""Trackers are listeners of a run's events: they get numbers, the config, and at the end plots, report and adapter.

What they write lies in `trackers/` of the run folder, unless their own environment variables say otherwise, and nothing
leaves the machine unless those do. A tracker that fails is named once and left out from then on: the run goes on, and
`metrics.jsonl` has all that a tracker would have had. What a resumed run says again it is told once.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from fedpeft import extras, registry
from fedpeft.config import Config, to_tree
from fedpeft.errors import InputError
from fedpeft.files import write_bytes

log = logging.getLogger("fedpeft")
Event = dict[str, Any]
NUMBERS = ("evaluate", "baselines", "round", "clients_evaluated", "task")  # kinds of events that trackers are told
FOLDERS = ("adapter", "plots")
FILES = ("resolved.yaml", "summary.json", "report.html")


class Tracker:
    """Base of all trackers: opened for a new run, or to go on with the tracker's run of the same folder.

    Attributes:
        package: what has to be installed.
        forgets: told again of a round, it shows the last that it was told.
    """

    package: ClassVar[str]
    forgets: ClassVar[bool] = False

    def __init__(self, folder: Path, run: str, config: dict[str, Any], after: int) -> None:
        """
        Args:
            folder: of the tracker's own files; it may hold those of before.
            run: a name that is the run's own.
            config: by dotted key.
            after: the round after which the run goes on; what was told of later ones comes again.
        """

    def log_numbers(self, values: dict[str, float], step: int) -> None:
        """Take numbers of round `step`, by name."""
        raise NotImplementedError

    def log_files(self, run: Path) -> None:
        """Take what the run has left in its folder (FILES, FOLDERS)."""
        raise NotImplementedError

    def close(self, failed: bool) -> None:
        """Write what is not yet written, and how the run ended."""


class Trackers:
    """All trackers of a run, and which of them still work."""

    def __init__(self) -> None:
        self.working: dict[str, Tracker] = {}
        self.told: dict[str, Told] = {}

    def open(self, names: list[str], run: Path, config: dict[str, Any], after: int) -> None:
        """Open trackers by name."""
        for name in names:

            def start(name: str = name) -> None:
                folder = run / "trackers" / name
                folder.mkdir(parents=True, exist_ok=True)
                made = registry.load("trackers", name, "run.trackers")
                self.told[name] = Told(folder / "told.json")
                self.working[name] = made(folder, run.resolve().name, config, after)

            self._attempt_act(name, start)

    def tell(self, event: Event) -> None:
        """Pass an event's numbers on."""
        values = numbers(event) if event["event"] in NUMBERS else {}
        for name, tracker in list(self.working.items()):
            self._attempt_act(
                name, partial(self._tell_tracker, tracker, self.told[name], values, event.get("round", 0))
            )

    def _tell_tracker(self, tracker: Tracker, told: Told, values: dict[str, float], step: int) -> None:
        fresh = values if tracker.forgets else told.unknown(values, step)
        if fresh:
            tracker.log_numbers(fresh, step)
            told.add(fresh, step)

    def take(self, run: Path) -> None:
        """Pass on what a finished run has left."""
        self._act_on_all(lambda tracker: tracker.log_files(run))

    def close(self, failed: bool) -> None:
        """End all."""
        self._act_on_all(lambda tracker: tracker.close(failed))

    def _act_on_all(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.working.items()):
            self._attempt_act(name, partial(act, tracker))

    def _attempt_act(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # of any kind: another program's, its disk's, its server's
            self.working.pop(name, None)
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            log.warning("the tracker %s failed and gets nothing more; the run goes on: %s", name, reason)


class Told:
    """The last round of each number that a tracker was told, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last: dict[str, int] = json.loads(path.read_text()) if path.is_file() else {}

    def unknown(self, values: dict[str, float], step: int) -> dict[str, float]:
        """Those of these numbers of round `step` that are to be told yet."""
        return {name: value for name, value in values.items() if self.last.get(name, -1) < step}

    def add(self, values: dict[str, float], step: int) -> None:
        """Remember that they were told."""
        # By number, as those of one round come in several events.
        self.last |= dict.fromkeys(values, step)
        write_bytes(self.path, json.dumps(self.last).encode())


@contextmanager
def track_run(config: Config, run: Path, after: int) -> Iterator[Trackers]:
    """The trackers of a run while it is at work.

    Raises:
        InputError: the package of one is not installed.
    """
    require_packages(config.run.trackers)
    trackers = Trackers()
    trackers.open(config.run.trackers, run, dotted(to_tree(config)), after)
    try:
        yield trackers
    except BaseException:
        # Of Ctrl-C too, or it would be shown as at work for good.
        trackers.close(failed=True)
        raise
    trackers.close(failed=False)


def list_files(run: Path) -> Iterator[tuple[str, Path]]:
    """All files that trackers take, by their path in the run folder."""
    for name in (*FILES, *FOLDERS):
        for path in [run / name] if name in FILES else sorted((run / name).rglob("*")):
            if path.is_file():
                yield path.relative_to(run).as_posix(), path


def numbers(event: Event) -> dict[str, float]:
    """Every finite number of an event, by its path of keys.

    >>> numbers({"event": "round", "round": 2, "accuracy": 0.5, "clients": ["a"], "norms": {"a": 1, "b": None}})
    {'accuracy': 0.5, 'norms/a': 1.0}
    """
    found: dict[str, float] = {}

    def walk(tree: Any, path: tuple[str, ...]) -> None:
        if isinstance(tree, dict):
            for key, value in tree.items():
                walk(value, (*path, str(key)))
        elif isinstance(tree, int | float) and not isinstance(tree, bool) and math.isfinite(tree):
            found["/".join(path)] = float(tree)

    walk({key: value for key, value in event.items() if key not in ("event", "time", "round")}, ())
    return found


def dotted(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """
    >>> dotted({"run": {"seed": 0}, "tta": {}})
    {'run.seed': 0, 'tta': {}}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def plain_name(name: str) -> str:
    """A name of letters, digits and `_./-`, which every tracker takes.

    >>> plain_name("clients/Zürich 1/f1")
    'clients/Z_rich_1/f1'
    """
    return re.sub(r"[^A-Za-z0-9_./-]", "_", name)


def check(config: Config) -> None:
    """Refuse trackers that there are not, or that are named twice."""
    names = config.run.trackers
    for name in names:
        if name not in registry.names("trackers"):
            raise InputError(registry.unknown("run.trackers", name, registry.names("trackers")))
        if names.count(name) > 1:
            raise InputError(f"run.trackers={names}: {name} stands there twice.")


def require_packages(names: list[str]) -> None:
    """Refuse trackers whose package is not installed. Who only reads a run's config, or its folder, needs none."""
    for name in names:
        extras.require(registry.load("trackers", name).package, f"run.trackers: {name}")
