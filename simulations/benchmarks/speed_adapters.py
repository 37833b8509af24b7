"""Local training by adapters that are not LoRA: a loop over clients, the cohort, and the cohort with DP-SGD.

    python -m fedpeft.simulations.benchmarks.speed_adapters OUT.json [REPEATS [ADAPTER;...]]

The loop is what everybody has: the values of a client are written into the model, AdamW steps on autograd's gradient,
they are taken out. Of IA3, DoRA, VeRA, FourierFT, MiSS and norms the layers are peft's own, of the others ours, which
peft does not have. Model, records and order are those of `speed`: one thread, every way in every repeat, each repeat
beginning with the next one. Ratios are medians over the repeats of CPU seconds. All ways are compared in float64 first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fedpeft import config as configs
from fedpeft.adapters.adapted import Adapted
from fedpeft.clients.cohort.engine import train_cohort
from fedpeft.clients.train import on_device
from fedpeft.config import AdapterConfig
from fedpeft.errors import RunError
from fedpeft.files import write_bytes
from fedpeft.simulations.benchmarks.speed import race
from fedpeft.simulations.benchmarks.speed_engines import Ends, adapted
from fedpeft.simulations.benchmarks.speed_work import Work, work
from fedpeft.state import AdapterState

CPU = torch.device("cpu")
MODEL, CLIENTS, BATCHES, LENGTH, STEPS = "S", 32, (2,), 64, 1
CLOSE = 1e-5  # FourierFT of peft computes its weight in float32


def _of_peft(name: str, **options: Any) -> AdapterConfig:
    return AdapterConfig(name="peft", options={"type": name, "options": options})


CASES: dict[str, AdapterConfig] = {
    "LoRA": AdapterConfig(r=8, alpha=16.0),
    "PaCA": AdapterConfig(name="paca", r=8, alpha=8.0),
    "IA3": _of_peft("IA3"),
    "DoRA": _of_peft("LORA", use_dora=True),
    "core, r = 32": AdapterConfig(name="nlora", r=32, alpha=32.0, options={"train": "core"}),
    "RAVAN, 4 cores": AdapterConfig(name="ravan", r=8, alpha=8.0),
    "SVFit, r = 64": AdapterConfig(name="svfit", r=64, alpha=64.0),
    "bottleneck": AdapterConfig(name="bottleneck", r=8, alpha=8.0),
    "bottleneck beside": AdapterConfig(name="bottleneck", r=8, alpha=8.0, options={"place": "parallel"}),
    "NLoRA": AdapterConfig(name="nlora", r=8, alpha=8.0),
    "NOLA, 64 a factor": AdapterConfig(name="nola", r=8, alpha=8.0),
    "SORSA": AdapterConfig(name="sorsa", r=8, alpha=8.0),
    "SoMA": AdapterConfig(name="soma", r=8, alpha=8.0),
    "BD-LoRA": AdapterConfig(name="bd_lora", r=8, alpha=8.0),
    "norms": _of_peft("LN_TUNING"),
    "VeRA": _of_peft("VERA", r=64),
    "MiSS": _of_peft("MISS", r=8),
    "FourierFT": _of_peft("FOURIERFT"),
}


class Way:
    """One way to train all clients of a work."""

    def __init__(self, model: Adapted, roles: list[str], together: bool, dp: bool) -> None:
        self.model, self.roles, self.together, self.dp = model, roles, together, dp

    def __call__(self, work: Work) -> Ends:
        if not self.together:
            return [self._loop(work, client) for client in range(len(work.data))]
        jobs = [work.job(client, self.dp) for client in range(len(work.data))]
        return [done.after for done in train_cohort(self.model, jobs, self.roles, work.config, None)]

    def _loop(self, work: Work, client: int) -> dict[str, torch.Tensor]:
        state = AdapterState(work.start, self.model.sites)
        self.model.write(state)
        parameters = self.model.train_roles(self.roles)
        rate, decay = work.config.lr, work.config.weight_decay
        optimizer = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=decay)
        self.model.training_mode()
        for index in work.drawn(client, dp=False):
            inputs, labels = on_device(work.data[client], index, CPU)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(self.model.logits(inputs), labels).backward()
            optimizer.step()
        return self.model.read(state.select(self.roles)).tensors


def make_ways(section: AdapterConfig, model: str, dtype: torch.dtype) -> tuple[dict[str, Way], AdapterState]:
    """The three ways over one model, and the state to start from."""
    made = adapted(model, CPU, dtype, section)
    own = getattr(configs.method("adapters", section.name, section.options, "adapter"), "averages", ("A", "B"))
    roles = [role for role in (*own, "head") if made.form.select([role]).tensors]
    ways = {"loop": Way(made, roles, False, False), "cohort": Way(made, roles, True, False)}
    return {**ways, "cohort-dp": Way(made, roles, True, True)}, made.state()


def require_same(name: str) -> None:
    """Train a few clients of a tiny model in float64 by the loop and by the cohort.

    Raises:
        RunError: they end apart, or nothing moved.
    """
    section = AdapterConfig(**{**vars(CASES[name]), "r": min(CASES[name].r, 8)})
    ways, state = make_ways(section, "tiny", torch.float64)
    case = work(state.tensors, 4, 2, 12, 3)
    one, other = ways["loop"](case), ways["cohort"](case)
    for mine, theirs in zip(one, other, strict=True):
        apart = max(float((mine[key] - value).abs().max()) for key, value in theirs.items())
        moved = max(float((state[key] - value).abs().max()) for key, value in theirs.items())
        if not apart < CLOSE < moved:
            raise RunError(f"speed_adapters: {name}: the cohort is {apart:.1e} off the loop (moved {moved:.1e}).")


def measure(name: str, batch: int, repeats: int) -> dict[str, Any]:
    """CPU seconds of each way, the loop's over the cohort's, and what DP adds."""
    ways, state = make_ways(CASES[name], MODEL, torch.float32)
    times = race(ways, work(state.tensors, CLIENTS, batch, LENGTH, STEPS), repeats, CPU)  # type: ignore[arg-type]
    cpu = {way: [seconds for _, seconds in each] for way, each in times.items()}
    return {
        "adapter": name,
        "batch": batch,
        "values": state.select(ways["loop"].roles).without(["head"]).parameters,
        **{way: round(median(each), 3) for way, each in cpu.items()},
        "cohort_over_loop": round(_ratio(cpu["loop"], cpu["cohort"]), 2),
        "dp_over_none": round(_ratio(cpu["cohort-dp"], cpu["cohort"]), 2),
    }


def _ratio(top: list[float], bottom: list[float]) -> float:
    return median(one / other for one, other in zip(top, bottom, strict=True))


def write(path: Path, repeats: int = 5, names: Sequence[str] = tuple(CASES)) -> None:
    """A row of each adapter, a line each, as they come."""
    torch.set_num_threads(1)
    rows: list[str] = []
    for name in names:
        require_same(name)
        for batch in BATCHES:
            rows.append(json.dumps(measure(name, batch, repeats)))
            print(rows[-1], flush=True)
            write_bytes(path, ("[\n" + ",\n".join(rows) + "\n]\n").encode())


if __name__ == "__main__":
    chosen = sys.argv[3].split(";") if len(sys.argv) > 3 else tuple(CASES)
    write(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5, chosen)
