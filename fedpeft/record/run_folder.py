"""A run folder, read for its pages and plots: events, config, summary and split, finished or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpeft import foreign
from fedpeft.errors import InputError
from fedpeft.files import read_object
from fedpeft.record import metrics

LONGEST_NAME = 100  # bytes of an owner's


@dataclass(frozen=True)
class Run:
    """A run folder as read. `label` is its shortest name that no other run has, `split` null without split.json, and
    `identity` what it ran on, as far as that was written down.
    """

    path: Path
    label: str
    events: list[metrics.Event]
    config: dict[str, Any]
    config_text: str
    summary: dict[str, Any]
    split: dict[str, Any] | None
    ended: bool
    identity: dict[str, Any] = field(default_factory=dict)

    def of(self, kind: str) -> list[metrics.Event]:
        """All events of one kind, in the order in which they were recorded."""
        return [event for event in self.events if event["event"] == kind]

    @property
    def scores(self) -> list[metrics.Event]:
        """`{round, accuracy, loss}` of what was evaluated on the same records: round 0 too, unless it was on others."""
        where, scores = metrics.evaluations(self.events)
        first = metrics.baseline(self.events)
        return [first, *scores] if first and first["evaluated_on"] == where else scores

    @property
    def wall_seconds(self) -> float | None:
        """From the first event to the last of a run that has ended; what was unlearned has the time of another."""
        times = [event["time"] for event in self.events if isinstance(event.get("time"), int | float)]
        known = self.ended and len(times) > 1 and "unlearning" not in self.summary
        return times[-1] - times[0] if known else None

    @property
    def hides_counts(self) -> bool:
        """Whether a guarantee covers the records, but not what their numbers by client and label would tell."""
        section = self.config.get("privacy") or {}
        return section.get("unit", "none") != "none" and not section.get("release_metrics", False)


def load(path: Path, label: str) -> Run:
    """Read a run folder, finished or not; clients are named by their owners where split.json knows them.

    Raises:
        InputError: no such folder, or a file of it that is missing or cannot be read.
    """
    if not path.is_dir():
        raise InputError(f"{path}: there is no such run folder.")
    config_text, config = read_config(path)
    events = metrics.read(path / "metrics.jsonl")
    identity = read_object(path / "identity.json") if (path / "identity.json").exists() else {}
    # The end is recorded before the results are written, which takes minutes, or fails where the disk is full.
    ended = (path / "summary.json").exists() and (
        "unlearning" in (identity.get("fingerprints") or {}) or any(event["event"] == "end" for event in events)
    )
    try:
        summary = metrics.summarise(events, config)
    except (InputError, LookupError, TypeError, AttributeError) as error:
        said = error if isinstance(error, InputError) else f"an event is not as runs record it: {error!r}"
        raise InputError(f"{path / 'metrics.jsonl'}: {said}") from error
    if ended:
        written = read_object(path / "summary.json")
        # What follows from the events is computed anew, so that runs of older versions have what pages of this one
        # show.
        summary |= {key: value for key, value in written.items() if key not in summary}
    split = _read_split(path / "split.json") if (path / "split.json").exists() else None
    if split and (names := _find_owners(split)):
        events, summary = renamed(events, names), renamed(summary, names)
        split["clients"] = {names.get(client, client): part for client, part in split["clients"].items()}
    return Run(path, label, events, config, config_text, summary, split, ended, identity)


def read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """The run's config as text and as nested dicts; InputError where it cannot be read."""
    text = _read_text(path / "resolved.yaml")
    return text, _parse_yaml(path / "resolved.yaml", text)


def owner_names(path: Path) -> dict[str, str]:
    """Client -> the name of its owner, as the report has it; empty where no split.json says it."""
    file = path / "split.json"
    return _find_owners(_read_split(file)) if file.exists() else {}


def label_runs(runs: Sequence[Path]) -> list[str]:
    """Trailing parts of each run's path, as few as tell all of them apart.

    Raises:
        InputError: the same run twice.
    """
    parts = [run.resolve().parts for run in runs]
    for run, names in zip(runs, parts, strict=True):
        if parts.count(names) > 1:
            raise InputError(f"{run} is given more than once.")
    depth = 1
    while len({names[-depth:] for names in parts}) < len(parts):
        depth += 1
    return ["/".join(names[-depth:]) for names in parts]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text.") from error


def _parse_yaml(path: Path, text: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    try:
        # Not checked as a config: runs of other versions, and of packages that are not here, have reports too.
        tree: Any = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # OmegaConf and PyYAML errors share no base
        raise InputError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a mapping of sections, found {type(tree).__name__}.")
    return tree


def _read_split(path: Path) -> dict[str, Any]:
    """The split: `clients` maps names to indices, `histogram` (which may be missing) has `labels` and `counts`."""
    split = read_object(path)
    clients, histogram = split.get("clients"), split.get("histogram")
    if not isinstance(clients, dict) or not clients:
        raise InputError(f"{path}: `clients` must map each client's name to its record indices.")
    if histogram:
        rows, width = histogram.get("counts", []), len(histogram.get("labels", []))
        if len(rows) != len(clients) or any(len(row) != width for row in rows):
            raise InputError(
                f"{path}: histogram.counts must have a row for each of the {len(clients)} clients and a "
                f"column for each of the {width} labels."
            )
    owners = split.get("owners", {})
    if not isinstance(owners, dict) or not all(isinstance(name, str) for name in owners.values()):
        raise InputError(f"{path}: `owners` must map names of clients to names of their owners.")
    return split


def _find_owners(split: dict[str, Any]) -> dict[str, str]:
    """Client -> owner, for those whose owner has another name; an owner of several clients is named with each."""
    owners = split.get("owners", {})
    names = {client: foreign.shown(owners.get(client, client), LONGEST_NAME) for client in split["clients"]}
    times = Counter(names.values())
    return {
        client: name if times[name] == 1 else f"{client} ({name})" for client, name in names.items() if name != client
    }


def renamed(tree: Any, names: dict[str, str]) -> Any:
    """A copy of plain data in which clients, as keys or as whole texts, have these names."""
    if isinstance(tree, dict):
        return {names.get(key, key): renamed(value, names) for key, value in tree.items()}
    if isinstance(tree, list):
        return [renamed(value, names) for value in tree]
    return names.get(tree, tree) if isinstance(tree, str) else tree
