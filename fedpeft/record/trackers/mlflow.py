"""MLflow: a file store in the run folder, or what MLFLOW_TRACKING_URI names; config as parameters, files as artefacts.

mlflow ui --backend-store-uri runs/NAME/trackers/mlflow/store
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedpeft.files import write_bytes
from fedpeft.record.trackers.base import Tracker, list_files, plain_name

EXPERIMENT = "fedpeft"
LONGEST = 500  # characters of a parameter
MOST = 100  # of a batch, by MLflow's own limits


class MLflowTracker(Tracker):
    """MLflow's file store in trackers/mlflow/store of the run."""

    package = "mlflow"

    def __init__(self, folder: Path, run: str, config: dict[str, Any], after: int) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # its default is to report
        # Newer ones refuse a store of files, which needs no server and no database, unless they are told so.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        place = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "store").resolve().as_uri()
        self.client = MlflowClient(place)
        known = folder / "run_id"
        if known.is_file():
            self.id = known.read_text()
            self.client.update_run(self.id, status="RUNNING")
            return
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        number = self.client.create_experiment(EXPERIMENT) if experiment is None else experiment.experiment_id
        self.id = self.client.create_run(number, run_name=run).info.run_id
        # A key may be a pattern of the user's, as those of peft's rank_pattern, with signs that MLflow refuses.
        for part in _cut_batches({plain_name(key): value for key, value in config.items()}):
            self.client.log_batch(self.id, params=[Param(key, str(value)[:LONGEST]) for key, value in part])
        write_bytes(known, self.id.encode())

    def log_numbers(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        for part in _cut_batches(values):
            found = [Metric(plain_name(name), value, now, step) for name, value in part]
            self.client.log_batch(self.id, metrics=found)

    def log_files(self, run: Path) -> None:
        for name, path in list_files(run):
            self.client.log_artifact(self.id, str(path), name.rpartition("/")[0] or None)

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


def _cut_batches(values: dict[str, Any]) -> Iterator[list[tuple[str, Any]]]:
    """Items, at most MOST at a time."""
    items = list(values.items())
    return (items[start : start + MOST] for start in range(0, len(items), MOST))
