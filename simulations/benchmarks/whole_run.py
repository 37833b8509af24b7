"""Whole simulations, start-up included: `fedpeft simulate` against a stock Flower app on Flower's engine (Ray), and
against a stock simulation on pfl-research where that is installed (see `pfl_loop`).

All get the same model folder, the same records dealt out evenly, one process that trains and one thread, and a process
tree of their own. CPU seconds and memory are those of all its processes, also of Ray's, read from /proc twice a second:
Ray's daemon does not wait for its workers, so that their times would be missing from the parent's. Memory that
processes share counts once for each. Ours evaluates the model before the first round and after the last, and writes a
checkpoint and a report, which the others do not.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from fedpeft import seeds
from fedpeft.errors import RunError
from fedpeft.models.embedded import byte_tokenizer
from fedpeft.simulations.benchmarks.data_memory import ADOPT_ORPHANS, descendants
from fedpeft.simulations.benchmarks.speed_work import CLIENT, LABELS, LORA, backbone

OURS = {"simulate": "float32", "simulate-auto": "auto"}  # engine -> model.dtype
ENGINES = (*OURS, "flower", "pfl")
RECORDS, TEST = 32, 64  # of a client, of the server
LOOK_S = 0.5


def prepare(folder: Path, model: str, clients: int, seq: int) -> None:
    """A model folder, and random texts of `seq` bytes with labels."""
    if (folder / "model" / "config.json").exists():
        return
    backbone(model).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    for name, count in (("train.csv", clients * RECORDS), ("test.csv", TEST)):
        generator = seeds.numpy_generator(0, "bench", "texts", name)
        letters = generator.integers(ord("a"), ord("z") + 1, (count, seq), dtype=np.uint8)
        rows = [f"{bytes(row).decode()},{index % LABELS}" for index, row in enumerate(letters)]
        (folder / name).write_text("\n".join(["text,label", *rows, ""]))


def measure(
    engine: str, folder: Path, clients: int, batch: int, seq: int, steps: int, rounds: int, device: str
) -> dict[str, float]:
    """Wall and CPU seconds, and peak MB, of one run.

    Raises:
        RunError: it failed.
    """
    environment = {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_TELEMETRY_ENABLED": "0",
    }
    sizes = (clients, batch, seq, steps, rounds, device)
    if engine in OURS:
        command = ours(folder, OURS[engine], *sizes)
    else:
        command = stock(engine, folder, *sizes)
    return watched(command, {**os.environ, **environment})


def ours(
    folder: Path, dtype: str, clients: int, batch: int, seq: int, steps: int, rounds: int, device: str
) -> list[str]:
    """The command of our run; its config is written."""
    config = {
        "model": {"name": str(folder / "model"), "task": "sequence-classification", "max_length": seq, "dtype": dtype},
        "adapter": {"r": LORA.r, "alpha": LORA.alpha},
        "data": {
            "source": str(folder / "train.csv"),
            "test": str(folder / "test.csv"),
            "clients": clients,
            "partition": {"name": "iid"},
        },
        "client": {"lr": CLIENT.lr, "local_steps": steps, "local_epochs": None, "batch_size": batch},
        "run": {
            "rounds": rounds,
            "baselines": False,
            "evaluate_every": rounds,
            "checkpoint_every": rounds,
            "device": device,
        },
    }
    name = f"run-{time.time_ns()}"
    (folder / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML
    return [
        sys.executable,
        "-m",
        "fedpeft.cli.main",
        "simulate",
        str(folder / f"{name}.yaml"),
        "--out",
        str(folder / name),
        "--json",
    ]


def stock(
    engine: str, folder: Path, clients: int, batch: int, seq: int, steps: int, rounds: int, device: str
) -> list[str]:
    """The command of another engine's run; its job is written."""
    name = f"{engine}-{time.time_ns()}"
    job = {
        "model": str(folder / "model"),
        "train": str(folder / "train.csv"),
        "seq": seq,
        "clients": clients,
        "batch": batch,
        "steps": steps,
        "rounds": rounds,
        "lr": CLIENT.lr,
        "rank": LORA.r,
        "alpha": int(LORA.alpha),
        "gpus": float(device != "cpu"),
        "out": str(folder / f"{name}.pt"),
    }
    (folder / f"{name}.json").write_text(json.dumps(job))
    script = f"import sys; from fedpeft.simulations.benchmarks.{engine}_loop import main; main(sys.argv[1])"
    return [sys.executable, "-c", script, str(folder / f"{name}.json")]


def watched(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """`tree` in a fresh process."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(tree, command, environment).result()


def tree(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Run a command, watching all that descends from this process; called in one that has had no other child.

    Raises:
        RunError: the command failed.
    """
    ctypes.CDLL(None).prctl(ADOPT_ORPHANS, 1, 0, 0, 0)
    spent: dict[int, float] = {}  # by process, the last that was seen
    peak, started = 0.0, time.perf_counter()
    with TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        while process.poll() is None:
            alive = descendants(os.getpid())
            spent |= {number: cpu for number, (cpu, _) in alive.items()}
            peak = max(peak, sum(memory for _, memory in alive.values()))
            time.sleep(LOOK_S)
        seconds = time.perf_counter() - started
        said.seek(0)
        if process.returncode:
            raise RunError(f"bench speed: {' '.join(command[1:4])} failed: {said.read()[-2000:]}")
    return {"seconds": seconds, "cpu_seconds": sum(spent.values()), "peak_mb": peak / 1e6}
