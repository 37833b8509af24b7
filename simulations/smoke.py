"""A tiny real run of every shipped config, each through the command line; CI runs it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from fedpeft import config as configs

# Few rounds and steps, but the config's own model, strategy, partition and engine.
TINY = ["run.rounds=2", "client.local_steps=2", "client.local_epochs=null", "data.limit=400"]


def main() -> int:
    """Print which shipped configs run; 1 if one does not, else 0."""
    failed = []
    with tempfile.TemporaryDirectory() as root:
        for name in configs.shipped_configs():
            out = Path(root) / name
            tiny = [*TINY, "continual.tasks=2"] if configs.load(name).continual.body else TINY
            command = [sys.executable, "-m", "fedpeft.cli.main", "simulate", name, *tiny, "--out", str(out), "--json"]
            done = subprocess.run(command, capture_output=True, text=True)
            good = done.returncode == 0 and (out / "adapter" / "adapter_model.safetensors").exists()
            detail = f"{json.loads(done.stdout)['seconds']:.1f} s" if good else done.stderr[-2000:]
            print(f"{'ok    ' if good else 'FAILED'} {name}: {detail}", flush=True)
            failed += [] if good else [name]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
