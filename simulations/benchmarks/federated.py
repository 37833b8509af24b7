"""`fedpeft bench federated`: do the published claims on federated LoRA hold, on a net where everything can be checked?

Experiments:

    dp              sample-level DP at epsilon 6, 3, 1 and none; all methods at one learning rate, each at its tuned one
    heterogeneity   label skew without privacy: differences from FedIT, final and round-averaged, and where they end
    rowspace        FedSVD never leaves the row space of its first A, and follows FFA-LoRA with orthonormal rows

Every method sees the same worlds, clients, batches and noise, so differences are paired by seed. Learning rates are
tuned per method and setting on worlds of their own, by accuracy on records held out of their training data. A claim is
a paired difference with its standard error over seeds, and a verdict; REPRODUCIBILITY.md has the numbers.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpeft import __version__, files, registry
from fedpeft.errors import InputError
from fedpeft.seeds import derive
from fedpeft.simulations.benchmarks.accounting import sigma, spent
from fedpeft.simulations.benchmarks.cells import Progress, Tell, silent
from fedpeft.simulations.benchmarks.federated_report import TUNED, Row, claims, figures
from fedpeft.simulations.benchmarks.toy import SITE, Method, Protocol, Run, World, make_world, simulate
from fedpeft.simulations.benchmarks.toy_baselines import baselines
from fedpeft.state import ServerState, Update
from fedpeft.strategies.rules.lora_fair import LoRAFAIR

EXPERIMENTS = ("dp", "heterogeneity", "rowspace")
TUNING_SEEDS = 3

DP = Protocol(
    inputs=128,
    hidden=64,
    classes=4,
    train=6000,
    test=3000,
    subspace=6,
    shift=1.5,
    rank=8,
    clients=6,
    per_round=3,
    alpha=0.5,
    min_examples=150,
    rounds=40,
    steps=10,
    batch=128,
    evaluate_every=4,
)
EPSILONS: tuple[float | None, ...] = (None, 6.0, 3.0, 1.0)
DP_GRID = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
DP_SHARED = (1.0, 0.5)

SKEW = Protocol(
    inputs=16,
    hidden=64,
    classes=8,
    train=3000,
    test=3000,
    subspace=None,
    shift=2.0,
    rank=8,
    clients=6,
    per_round=6,
    alpha=0.2,
    min_examples=32,
    rounds=10,
    steps=20,
    batch=64,
)
SKEW_SETTINGS = {  # name -> protocol and learning rate; the first is the main one, the others are where its claims end
    "main": (SKEW, 0.3),
    "30 rounds, 3 of 6 clients": (replace(SKEW, rounds=30, per_round=3), 0.3),
    "15 rounds of 100 steps": (replace(SKEW, rounds=15, steps=100), 0.1),
    "10 rounds of 100 steps": (replace(SKEW, steps=100), 0.3),
}
SKEW_GRID = (0.15, 0.3, 0.6, 1.2, 2.4)


class AbsoluteFAIR(LoRAFAIR):
    """LoRA-FAIR's closed form with lambda as written in the papers; the shipped one is relative to tr(A A^T) / r."""

    def aggregate(self, server: ServerState, updates: list[Update]) -> ServerState:
        A = self.average(updates)[f"{SITE}/A"]
        return LoRAFAIR(lambda_=self.config.lambda_ * A.shape[0] / float(A.square().sum())).aggregate(server, updates)


def method(name: str, strategy: str, scale_A: float = 1.0, **options: Any) -> Method:
    """A row of the tables: a registered strategy with these options, and the factor on the A that it starts from."""
    return Method(name, partial(registry.load("strategies", strategy), **options), scale_A)


def dp_methods() -> list[Method]:
    """Methods of the experiment under differential privacy: FedIT, FFA and FedSVD, and controls of the last two."""
    return [
        method("FedIT", "fedit"),
        method("FFA", "ffa_lora", transport="dense"),
        method("FFA x sqrt 3", "ffa_lora", math.sqrt(3), transport="dense"),
        method("FFA orthonormal", "ffa_lora", transport="dense", init="orthonormal"),
        method("FedSVD", "fedsvd", transport="dense"),
        method("FedSVD sqrt split", "fedsvd", transport="dense", split="sqrt"),
    ]


def skew_methods() -> list[Method]:
    """Methods of the experiment with skewed labels; each LoRA-FAIR also with lambda as written in the papers."""
    return [
        method("FedIT", "fedit"),
        method("LoRA-FAIR .01", "lora_fair", lambda_=0.01),
        method("LoRA-FAIR 1", "lora_fair", lambda_=1.0),
        Method("LoRA-FAIR .01 absolute", partial(AbsoluteFAIR, lambda_=0.01)),
        Method("LoRA-FAIR 1 absolute", partial(AbsoluteFAIR, lambda_=1.0)),
        method("LoRA-FAIR cosine", "lora_fair", solver="cosine"),
        method("FlexLoRA", "flexlora"),
        method("FedEx", "fedex"),
        method("FLoRA", "flora"),
        method("FFA", "ffa_lora", transport="dense"),
    ]


# Experiments ----------------------------------------------------------------------------------------------------------


def dp_experiment(count: int, quick: bool, done: Tell = silent) -> list[Row]:
    """Rows of the DP experiment for seeds 0 to `count` - 1."""
    protocol = replace(DP, rounds=8) if quick else DP
    grid, shared, epsilons = ((0.5, 1.0), (1.0,), (None, 6.0, 1.0)) if quick else (DP_GRID, DP_SHARED, EPSILONS)
    worlds, tuning = _worlds(protocol, count), tuning_worlds(protocol, 1 if quick else TUNING_SEEDS)
    rows = []
    for epsilon in epsilons:
        for one in dp_methods():
            where = {"experiment": "dp", "setting": "no DP" if epsilon is None else f"epsilon {epsilon:g}"}
            rows += _compare(where, protocol, worlds, tuning, one, shared, grid, "final", epsilon)
            done(f"dp, {where['setting']}: {one.name}")
    return rows


def skew_experiment(count: int, quick: bool, done: Tell = silent) -> list[Row]:
    """Rows of the heterogeneity experiment; rates are tuned in the main setting only."""
    settings = {"main": (replace(SKEW, rounds=4), 0.3)} if quick else SKEW_SETTINGS
    grid = (0.15, 0.3) if quick else SKEW_GRID
    rows = []
    for setting, (protocol, lr) in settings.items():
        worlds = _worlds(protocol, count)
        tuning = tuning_worlds(protocol, 1 if quick else TUNING_SEEDS) if setting == "main" else []
        for one in skew_methods():
            where = {"experiment": "heterogeneity", "setting": setting}
            rows += _compare(where, protocol, worlds, tuning, one, (lr,), grid, "average", None)
            done(f"heterogeneity, {setting}: {one.name}")
    return rows


def _worlds(protocol: Protocol, count: int) -> list[World]:
    return [make_world(protocol, seed) for seed in range(count)]


def tuning_worlds(protocol: Protocol, count: int) -> list[World]:
    """Worlds of other seeds than the reported ones; their held-out records come from their training data."""
    return [make_world(protocol, derive(0, "bench", "tuning", number), "validation") for number in range(count)]


def tune(
    protocol: Protocol, worlds: Sequence[World], one: Method, grid: Sequence[float], by: str, epsilon: float | None
) -> dict[float, float]:
    """Mean over `worlds` of each learning rate's score ("final" or "average")."""
    scores: dict[float, list[float]] = {lr: [] for lr in grid}
    for run in simulate(protocol, worlds, one, grid, epsilon):
        scores[run.lr].append(getattr(run, by))
    return {lr: sum(values) / len(values) for lr, values in scores.items()}


def _compare(
    where: Row,
    protocol: Protocol,
    worlds: Sequence[World],
    tuning: Sequence[World],
    one: Method,
    shared: Sequence[float],
    grid: Sequence[float],
    by: str,
    epsilon: float | None,
) -> list[Row]:
    """One method in one setting: rows of all seeds at each shared learning rate and, given tuning worlds, the best."""
    columns = {f"lr {lr:g}": lr for lr in shared}
    tuned: dict[float, float] = {}
    if tuning:
        tuned = tune(protocol, tuning, one, grid, by, epsilon)
        columns[TUNED] = max(tuned, key=lambda lr: tuned[lr])
    runs = simulate(protocol, worlds, one, sorted(set(columns.values())), epsilon)
    home = {world.seed: world for world in worlds}
    rows = []
    for column, lr in columns.items():
        for run in (run for run in runs if run.lr == lr):
            row = where | {
                "column": column,
                "method": run.method,
                "lr": lr,
                "seed": run.seed,
                "final": run.final,
                "average": run.average,
                "curve": run.curve,
                "failed_round": run.failed,
            }
            if column == TUNED:
                row["validation_by_lr"] = tuned
            if epsilon is not None:
                row |= {"epsilon": epsilon, "epsilon_max_client": _max_epsilon(protocol, home[run.seed], run, epsilon)}
            rows.append(row)
    return rows


def _max_epsilon(protocol: Protocol, world: World, run: Run, epsilon: float) -> float:
    """What the most exposed client spent in the rounds that it took part in (the noise was set for all rounds)."""
    planned, highest = protocol.rounds * protocol.steps, 0.0
    for client, rounds in run.participation.items():
        size = len(world.parts[client])
        noise = sigma(size, protocol.batch, planned, epsilon, protocol.delta)
        highest = max(highest, spent(noise, size, protocol.batch, rounds * protocol.steps, protocol.delta))
    return highest


def rowspace_experiment(count: int, quick: bool, done: Tell = silent) -> list[Row]:
    """FedSVD in float64 without DP, against FFA-LoRA with orthonormal rows; FedIT is the contrast.

    `path_difference` is the largest relative distance between the two paths of B A over all rounds, `span_deviation`
    the largest part of the rows of A outside the row space of the first A, relative.
    """
    protocol = replace(DP, rounds=4 if quick else 20, evaluate_every=20)
    worlds = _worlds(protocol, count)
    control = method("FFA orthonormal", "ffa_lora", transport="dense", init="orthonormal")
    reference = _path(protocol, worlds, control)
    rows = []
    for one in (
        method("FedSVD", "fedsvd", transport="dense", init="orthonormal"),
        method("FedSVD every 5", "fedsvd", transport="dense", init="orthonormal", every=5),
        method("FedIT", "fedit"),
    ):
        path = _path(protocol, worlds, one)
        for seed in range(count):
            basis = reference[0][1][seed]
            apart = max(
                _relative(BA[seed] - expected[seed], expected[seed])
                for (BA, _), (expected, _) in zip(path, reference, strict=True)
            )
            outside = max(_relative(A[seed] - A[seed] @ basis.T @ basis, A[seed]) for _, A in path)
            rows.append(
                {
                    "experiment": "rowspace",
                    "method": one.name,
                    "seed": seed,
                    "rounds": protocol.rounds,
                    "path_difference": apart,
                    "span_deviation": outside,
                }
            )
        done(f"rowspace: {one.name}")
    return rows


def _path(protocol: Protocol, worlds: Sequence[World], one: Method) -> list[tuple[Tensor, Tensor]]:
    """B A [seeds, h, n] and A [seeds, r, n] after every round at learning rate 0.5."""
    path = []

    def trace(runs: list[Run]) -> None:
        A = torch.stack([run.server.adapter[f"{SITE}/A"] for run in runs])
        path.append((torch.stack([run.server.adapter[f"{SITE}/B"] for run in runs]) @ A, A))

    simulate(protocol, worlds, one, (0.5,), dtype=torch.float64, after_round=trace)
    return path


def _relative(difference: Tensor, to: Tensor) -> float:
    return float(difference.norm() / to.norm())


def parts(quick: bool) -> Row:
    """How many methods and settings each experiment has, each told of when it is finished."""
    epsilons, settings = (3, 1) if quick else (len(EPSILONS), len(SKEW_SETTINGS))
    return {"dp": epsilons * len(dp_methods()), "heterogeneity": settings * len(skew_methods()), "rowspace": 3}


def run(
    out: Path, seeds: int = 8, quick: bool = False, experiments: Sequence[str] = EXPERIMENTS, tell: Tell = silent
) -> Row:
    """Run the experiments and write results.json and plots to `out`.

    Args:
        seeds: number of reported seeds, two at least.
        quick: few rounds, settings and rates: shows that the benchmark works, says nothing about methods.
        tell: is given a line for every method and setting.

    Raises:
        InputError: an unknown experiment, or fewer than two seeds.
    """
    functions = {"dp": dp_experiment, "heterogeneity": skew_experiment, "rowspace": rowspace_experiment}
    for name in experiments:
        if name not in functions:
            raise InputError(registry.unknown("experiments", name, functions))
    if seeds < 2:
        raise InputError(f"seeds={seeds}: a paired difference needs two seeds at least.")
    progress = Progress(tell, sum(parts(quick)[name] for name in experiments))
    rows, seconds = [], {}
    for name in experiments:
        started = time.perf_counter()
        rows += functions[name](seeds, quick, progress)
        seconds[name] = time.perf_counter() - started
    reference = [
        row
        for name, protocol in (("dp", DP), ("heterogeneity", SKEW))
        if name in experiments
        for row in baselines(name, _worlds(protocol, seeds))
    ]
    versions = {"fedpeft": __version__, "torch": torch.__version__, "python": platform.python_version()}
    command = f"fedpeft bench federated --out DIR --seeds {seeds}{' --quick' if quick else ''}"
    results = {
        "reproduce": command,
        "quick": quick,
        "experiments": list(experiments),
        "seeds": seeds,
        "seconds": seconds,
        "versions": versions,
        "claims": claims(rows),
        "baselines": reference,
        "rows": rows,
    }
    files.write_bytes(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    for name, image in figures(rows).items():
        files.write_bytes(out / f"{name}.png", image)
    return results
