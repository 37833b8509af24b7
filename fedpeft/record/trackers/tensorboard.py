"""TensorBoard: event files that `tensorboard --logdir runs` shows; numbers as scalars, config as text, plots as images.

It has no place for files, so that the adapter is named with its folder, nor for how a run ended.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedpeft.record.trackers.base import Tracker


class TensorBoardTracker(Tracker):
    """TensorBoard's event files in trackers/tensorboard of the run."""

    package = "tensorboard"
    forgets = True

    def __init__(self, folder: Path, run: str, config: dict[str, Any], after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run had told of later rounds is not shown any more.
        self.writer: Any = SummaryWriter(str(folder), purge_step=after + 1 if after else 0)
        if not after:
            self.writer.add_text("config", f"```\n{json.dumps(config, indent=1, default=str)}\n```", 0)

    def log_numbers(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def log_files(self, run: Path) -> None:
        import numpy as np
        from PIL import Image

        for path in sorted((run / "plots").glob("*.png")):
            with Image.open(path) as image:
                self.writer.add_image(f"plots/{path.stem}", np.asarray(image.convert("RGB")), 0, dataformats="HWC")
        self.writer.add_text("adapter", str((run / "adapter").resolve()), 0)

    def close(self, failed: bool) -> None:
        self.writer.close()
