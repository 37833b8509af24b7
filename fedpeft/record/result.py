"""What a run came to, for Python: its summary as a dict, its rounds as a table, and itself as a notebook shows it."""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft import folders
from fedpeft.files import read_object
from fedpeft.record import lead, metrics, run_folder

if TYPE_CHECKING:
    import pandas


class Result(dict[str, Any]):
    """The content of a run's summary.json, and `out`, its folder. In a notebook it is its first lines and its rounds.

    >>> result = Result(headline="91.8 %", out="runs/first")
    >>> result["headline"], result.folder.name
    ('91.8 %', 'first')
    """

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self["out"])

    @property
    def rounds(self) -> pandas.DataFrame:
        """A row for each complete round, and 0 where the model was evaluated before training: every value of
        metrics.jsonl that is one number, so losses, measures, bytes, seconds and epsilon. Empty cells are NaN.
        """
        import pandas

        rows: dict[int, dict[str, Any]] = {}
        for event in metrics.read(self.folder / "metrics.jsonl"):
            if event["event"] in ("round", "evaluate"):
                numbers = {key: value for key, value in event.items() if isinstance(value, int | float)}
                rows.setdefault(event["round"], {}).update(numbers)
        if not rows:
            return pandas.DataFrame(index=pandas.Index([], name="round"))
        return pandas.DataFrame([rows[number] for number in sorted(rows)]).set_index("round").drop(columns="time")

    @property
    def updates(self) -> pandas.DataFrame:
        """A row for each client's update of each round: its norm and its distance from the median (L2), and, where it
        was left out, the reason.
        """
        import pandas

        rows = []
        for event in metrics.read(self.folder / "metrics.jsonl"):
            if event["event"] == "round":
                norms, distances = event.get("update_norms") or {}, event.get("update_distances") or {}
                for client in dict.fromkeys([*event["clients"], *event["quarantined"]]):
                    reason = event["quarantined"].get(client)
                    rows.append((event["round"], client, norms.get(client), distances.get(client), reason))
        return pandas.DataFrame(rows, columns=["round", "client", "norm", "distance", "quarantined"])

    def _repr_html_(self) -> str:
        from fedpeft.record import report

        run = run_folder.load(self.folder, self.folder.name)
        lines = [*lead.sentences(run.summary, run.config), *lead.list_warnings(run.summary)]
        page = f"<p>{html.escape(str(self.folder / 'report.html'))}</p>"
        return "\n".join([*(f"<p>{html.escape(line)}</p>" for line in lines), report.html_rounds(run), page])


def load_ended(run: str | Path) -> Result | None:
    """The result of a run that has ended as its config says, with all that it leaves; None of any other.

    Raises:
        InputError: a file of it cannot be read; names it.
    """
    path = Path(os.path.expanduser(run))
    # What was removed of them is made again by going on.
    needed = ("resolved.yaml", "summary.json", "metrics.jsonl", "adapter", "report.html")
    if not all((path / name).exists() for name in needed):
        return None
    events = metrics.read(path / "metrics.jsonl")
    rounds = (run_folder.read_config(path)[1].get("run") or {}).get("rounds")
    if not events or events[-1]["event"] != "end" or events[-1].get("round") != rounds:
        return None
    # Where the last state is gone, its round is done again, by a base and data that are compared first.
    if folders.list_complete_rounds(path)[-1:] != [rounds]:
        return None
    return Result(read_object(path / "summary.json"), out=str(path.resolve()))


def load(run: str | Path) -> Result:
    """The result of a run that has ended, or of one that has not as far as it came.

    Raises:
        InputError: the folder holds no run, or a file of it cannot be read; names it.
    """
    path = folders.run_folder(run)
    return Result(run_folder.load(path, path.name).summary, out=str(path))
