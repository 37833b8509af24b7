"""Sha256 of what every shipped config and every method computes, to compare before and after a change of form.

    python tests/golden.py FILE            write FILE (JSON), or compare with it when it is there
    python tests/golden.py FILE tta/ ...   only the entries whose names begin so

Values are those of one machine: two processors round otherwise, so that no value is kept in the repository.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.update(FLWR_TELEMETRY_ENABLED="0", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import torch

torch.set_num_threads(1)


def digest(value: Any) -> str:
    """Of tensors, numbers and texts, nested in dicts and lists."""
    known = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, dict):
            for key in sorted(part.keys() - {"train_cpu_s"}, key=str):
                known.update(str(key).encode())
                add(part[key])
        elif isinstance(part, list | tuple):
            for item in part:
                add(item)
        elif isinstance(part, torch.Tensor):
            known.update(str((part.dtype, tuple(part.shape))).encode())
            known.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            known.update(repr(part).encode())

    add(value)
    return known.hexdigest()[:16]


def simulated(preset: dict[str, Any], config: dict[str, Any]) -> str:
    """The last checkpoint and the peft folder of one run."""
    from safetensors.torch import load_file

    from fedpeft.record import checkpoint, report
    from fedpeft.simulations.run import simulate

    report.write = lambda run: []
    with tempfile.TemporaryDirectory() as root:
        simulate(preset, config, Path(root) / "run")
        state = checkpoint.latest(Path(root) / "run" / "checkpoints")
        peft = load_file(Path(root) / "run" / "adapter" / "adapter_model.safetensors")
        return digest([dict(state.adapter.tensors), dict(state.memory), dict(peft)])


def entries() -> Iterator[tuple[str, Callable[[], str]]]:
    from fedpeft import config as configs
    from fedpeft import registry
    from support.methods import TINY, settings

    for name in configs.shipped_configs():
        short = {"run.rounds": 2, "client.local_steps": 2, "client.local_epochs": None, "data.limit": 400}
        if configs.load(name).continual.body:
            short["continual.tasks"] = 2
        yield f"config/{name}", lambda name=name, short=short: simulated(name, short)
    for name in registry.names("strategies"):
        yield f"strategy/{name}", lambda name=name: simulated({}, {**TINY, **settings(name), "run.rounds": 2})
    for name in registry.names("bodies"):
        yield f"body/{name}", lambda name=name: body(name)
    for name in registry.names("tta"):
        yield f"tta/{name}", lambda name=name: adapted(name)
    for name in registry.names("mergers"):
        yield f"merger/{name}", lambda name=name: merged(name)


def body(name: str) -> str:
    from support import continual_parts

    made = continual_parts.learner(name, continual_parts.heads_of(name))
    made.run()
    return digest(made.state())


def adapted(name: str) -> str:
    from support import small_models
    from support import tta_parts as parts

    with tempfile.TemporaryDirectory() as root:
        if name in parts.LANGUAGE:
            model = parts.language(small_models.save("llama", Path(root) / "llama"), "llama")
        else:
            model = parts.vit(small_models.save("vit", Path(root) / "vit"))
        return digest(parts.play(parts.method(name, model), parts.stream(model=model)))


def merged(name: str) -> str:
    from fedpeft.merging.base import merge
    from support.methods import MADE, NUMBERS

    return digest(dict(merge(name, MADE, None, NUMBERS.get(name)).tensors))


def main(path: Path, prefixes: tuple[str, ...]) -> int:
    wanted = json.loads(path.read_text()) if path.exists() else {}
    found, changed = {}, 0
    for name, compute in entries():
        if prefixes and not name.startswith(prefixes):
            continue
        found[name] = compute()
        differs = bool(wanted) and wanted.get(name) != found[name]
        changed += differs
        print(f"{'CHANGED ' if differs else ''}{name} {found[name]}", flush=True)
    if not path.exists():
        path.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), tuple(sys.argv[2:])))
