"""Memory of a real site's two processes, and what importing its libraries takes of it.

    python -m fedpeft.simulations.benchmarks.site_memory OUT

imports   what a fresh process has after each line of LINES, one more library in each
sites     two sites on loopback as in `deploy_overhead`, of which the first is looked at: when it is connected, at most
          while it takes part in rounds, and while it waits again; once with the model of 0.4 MB, once with one of
          104 MB (BERT's shape, random weights) and records of 256 tokens

Private memory, in MB: pages that no file has (Anonymous in /proc/PID/smaps_rollup). A model's weights are pages of its
file, which the kernel may take back. Writes OUT/memory.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from fedpeft.deploy.coordinator import server as commands
from fedpeft.simulations.benchmarks.data_memory import descendants, memory
from fedpeft.simulations.benchmarks.deploy_overhead import CONFIG, SITES, prepared, running

LINES = {
    "Python": "pass",
    "NumPy": "import numpy",
    "torch": "import torch",
    "a model class of transformers": "from transformers import BertForSequenceClassification",
    "peft": "from fedpeft.models.quantized import import_kernels; import_kernels(); import peft",
    "Flower": "import flwr.app, flwr.clientapp",
    "fedpeft's worker": "import fedpeft.deploy.site.worker",
}
CLASSES = ("ViTForImageClassification", "BertForSequenceClassification", "LlamaForCausalLM")
SAY = "print(*(row.split()[1] for row in open('/proc/self/smaps_rollup') if row.startswith('Anonymous')))"  # kB
ROUNDS, TOKENS = 12, 256
LOOK_S, PATIENCE_S = 0.1, 120.0
WAIT_S = 25.0  # longer than a pull waits at the coordinator
Row = dict[str, Any]


def main(out: Path) -> Row:
    """Measure, write OUT/memory.json."""
    out.mkdir(parents=True, exist_ok=True)
    found: Row = {"imports": imports(), "classes": {name: imported([*_before(name)]) for name in CLASSES}}
    found["sites"] = {
        "0.4 MB": site_memory(out / "small", "word", "tiny-bert", 130),
        "104 MB": site_memory(out / "large", "word " * (TOKENS // 5), str(make_model(out / "model")), 8),
    }
    (out / "memory.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


def imports() -> dict[str, float]:
    """MB after each line and those before it."""
    lines = list(LINES.values())
    return {name: imported(lines[: index + 1]) for index, name in enumerate(LINES)}


def _before(name: str) -> tuple[str, str]:
    return LINES["torch"], f"from transformers import {name}"


def imported(lines: list[str]) -> float:
    """MB of a fresh process after these lines."""
    done = subprocess.run([sys.executable, "-c", "\n".join([*lines, SAY])], capture_output=True, text=True, check=True)
    return round(float(done.stdout.split("\n")[-2]) * 1024 / 1e6, 1)


def make_model(folder: Path) -> Path:
    """A folder with a BERT of 26 million float32 parameters and the tokenizer of `tiny-bert`."""
    import torch
    import transformers

    from fedpeft import config as configs
    from fedpeft.models import loading

    own = {"model.name": "tiny-bert", "model.task": "sequence-classification"}
    tiny = loading.load(configs.load({}, own).model, 2, 0)
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 2048}
    config = transformers.BertConfig(vocab_size=len(tiny.processor), **shape)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return folder


def site_memory(root: Path, text: str, model: str, rank: int) -> Row:
    """MB of the first site's node and worker over a run."""
    root.mkdir()
    coordinator = prepared(root, text, model)
    config = root / "memory.yaml"
    tree = {**CONFIG, "run": {"rounds": ROUNDS}, "model": {**CONFIG["model"], "name": model, "max_length": TOKENS}}
    tree["adapter"] = {**CONFIG["adapter"], "r": rank, "alpha": rank}
    config.write_text(json.dumps(tree))
    cli = [sys.executable, "-m", "fedpeft.cli.main"]
    starts = {"coordinator": ["server", "start", str(coordinator)]}
    starts |= {name: ["site", "start", str(root / name)] for name in SITES}
    with running(root, {name: [*cli, *command] for name, command in starts.items()}):
        commands.await_sites(coordinator, len(SITES), PATIENCE_S, LOOK_S)
        node = process_of(str(root / SITES[0]))
        processes = {"node": node, "worker": next(iter(descendants(node)))}
        rows, over = {"connected": private(processes)}, threading.Event()
        most = rows["most"] = dict(rows["connected"])

        def look() -> None:
            while not over.wait(LOOK_S):
                most.update({role: max(most[role], found) for role, found in private(processes).items()})

        watching = threading.Thread(target=look, daemon=True)
        watching.start()
        commands.wait(coordinator, commands.run(coordinator, str(config), [])["run"], lambda event: None)
        over.set()
        watching.join()
        rows["ended"] = private(processes)
        time.sleep(WAIT_S)
        rows["waiting"] = private(processes)
    return rows


def private(processes: dict[str, int]) -> dict[str, float]:
    """MB of each."""
    return {role: round(memory(number)["anonymous"], 1) for role, number in processes.items()}


def process_of(folder: str) -> int:
    """The process of `site start FOLDER`."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        words = path.read_text().split("\0")
        if words[-4:-1] == ["site", "start", folder]:
            return int(path.parent.name)
    raise ProcessLookupError(folder)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]).absolute()), indent=2))
