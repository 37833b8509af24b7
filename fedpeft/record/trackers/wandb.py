"""Weights & Biases: offline in the run folder, for `wandb sync`, unless WANDB_MODE says otherwise."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from fedpeft.files import write_bytes
from fedpeft.record.trackers.base import Tracker, list_files, plain_name


class WandbTracker(Tracker):
    """W&B's files in trackers/wandb of the run."""

    package = "wandb"

    def __init__(self, folder: Path, run: str, config: dict[str, Any], after: int) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its default is to report
        import wandb

        known = folder / "run_id"
        if not known.is_file():
            write_bytes(known, secrets.token_hex(8).encode())
        quiet = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True, x_disable_stats=True)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fedpeft"),
            name=run,
            id=known.read_text(),
            resume="allow",
            dir=str(folder),
            config=config,
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            settings=quiet,
        )
        self.run.define_metric("round")
        self.run.define_metric("*", step_metric="round")  # not by W&B's own steps, which a resumed run could not repeat

    def log_numbers(self, values: dict[str, float], step: int) -> None:
        self.run.log({**values, "round": step})

    def log_files(self, run: Path) -> None:
        import wandb

        results = wandb.Artifact(f"{plain_name(run.resolve().name)}-results", type="results")
        adapter = wandb.Artifact(f"{plain_name(run.resolve().name)}-adapter", type="model")
        for name, path in list_files(run):
            (adapter if name.startswith("adapter/") else results).add_file(str(path), name=name)
        self.run.log_artifact(results)
        self.run.log_artifact(adapter)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))
