"""A tiny real run of every shipped config, each through the command line; CI runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fedpeft import config as configs
from fedpeft.simulations import stand_ins

# Few rounds and steps, but the config's own model, strategy, partition and engine.
TINY = ["run.rounds=2", "client.local_steps=2", "client.local_epochs=null", "data.limit=400"]


def run(name: str, root: Path) -> tuple[bool, str]:
    """Run one config as a user would, in a process of its own; whether it ended well, and its seconds or its error."""
    out = root / name
    if name.startswith("jobs/"):
        small = stand_ins.overrides(name.removeprefix("jobs/"), root)
        tiny = [f"{key}={'null' if value is None else value}" for key, value in small.items()]
    else:
        tiny = [*TINY, "continual.tasks=2"] if configs.load(name).continual.body else TINY
    command = [sys.executable, "-m", "fedpeft.cli.main", "simulate", name, *tiny, "--out", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    good = done.returncode == 0 and (out / "adapter" / "adapter_model.safetensors").exists()
    return good, f"{json.loads(done.stdout)['seconds']:.1f} s" if good else done.stderr[-2000:]


def main() -> int:
    """Print which shipped configs run; 1 if one does not, else 0."""
    names, good = [*configs.shipped_configs(), *configs.job_configs()], True
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, (ended_well, detail) in zip(names, pool.map(lambda name: run(name, Path(root)), names), strict=True):
            print(f"{'ok    ' if ended_well else 'FAILED'} {name}: {detail}", flush=True)
            good = good and ended_well
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
