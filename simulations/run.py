"""One simulated run from config to adapter folder, and its resumption: `fedpeft simulate` and `fedpeft resume`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedpeft import config as configs
from fedpeft import folders, registry
from fedpeft.adapters import folder
from fedpeft.adapters.flat import flat
from fedpeft.clients import test_time
from fedpeft.clients.app import client_app
from fedpeft.clients.train import evaluate
from fedpeft.config import Config
from fedpeft.data import split
from fedpeft.data.skipped import said_elsewhere
from fedpeft.errors import InputError, RunError
from fedpeft.files import write_bytes
from fedpeft.models import loading
from fedpeft.record import checkpoint, report
from fedpeft.record.metrics import Recorder, read, summarise
from fedpeft.run import comparators, guarantee, identity, sequence
from fedpeft.run.world import World, records, settle, world
from fedpeft.simulations import faults
from fedpeft.simulations.baselines import attempted, baselines
from fedpeft.simulations.grid import LocalGrid
from fedpeft.simulations.ray_engine import start_ray, stop_ray
from fedpeft.state import DROPPED, Rules, ServerState
from fedpeft.strategies import wire
from fedpeft.strategies.secagg import terms
from fedpeft.strategies.sequence import exchange
from fedpeft.strategies.wrappers.client_dp import ClientDP

log = logging.getLogger("fedpeft")
OnEvent = Callable[[dict[str, Any]], None]


def simulate(
    source: str | Path | dict[str, Any],
    overrides: Sequence[str] | dict[str, Any] = (),
    out: str | Path | None = None,
    on_event: OnEvent = lambda event: None,
) -> dict[str, Any]:
    """Run a simulation from its first round.

    Args:
        source: a config file, the name of a shipped config, or a mapping.
        overrides: `key=value` strings or a mapping of dotted keys.
        out: the run folder, new or empty. Default is runs/NAME-1, -2, ..., the one after the highest that is there,
            with NAME = <config>-<strategy>-seed<seed>; runs/NAME is a link to the newest.
        on_event: receives every event that goes to metrics.jsonl, and before them `folder` with its `path`,
            `given` by the caller or not.

    Returns:
        The content of summary.json, and `out`.

    Raises:
        InputError: the config, the data or the model cannot be used; nothing was trained.
        RunError: the run failed; it can be resumed.
    """
    config = configs.load(source, overrides)
    if config.run.engine == "sites":
        raise InputError("run.engine=sites: real sites are run by `fedpeft server run`. Set run.engine=cohort or ray.")
    _absolute(config)
    records.cache_clear()  # files may have changed since an earlier run of this process
    faults.check(config.run, settle(config))
    name = f"{'run' if isinstance(source, dict) else Path(source).stem}-{config.strategy.name}-seed{config.run.seed}"
    with folders.new(out, Path("runs") / name, hint=", or go on with `fedpeft resume {}`") as made:
        run = made.path
        on_event({"event": "folder", "path": str(run), "given": out is not None})

        def tell(event: dict[str, Any]) -> None:
            if event["event"] == "start":
                made.point()
            on_event(event)

        try:
            write_bytes(run / "resolved.yaml", configs.to_yaml(config).encode())
            identity.begin(run)
            return _go(config, run, tell)
        except InputError:
            if not (run / "metrics.jsonl").exists():  # nothing was trained: the command, mended, may use the folder
                made.undo("resolved.yaml", identity.FILE, "split.json", folders.LOCK)
            raise


def resume(run: str | Path, on_event: OnEvent = lambda event: None) -> dict[str, Any]:
    """Go on with a run after its last complete checkpoint; a finished run is only reported again.

    Raises:
        InputError: the folder holds no run, another process works in it, or the base or the data are others now.
        RunError: the run failed; it can be resumed.
    """
    run = folders.run_folder(run)
    config = configs.load(run / "resolved.yaml")
    if config.run.engine == "sites":
        raise InputError(f"{run}: a run of real sites; its coordinator goes on with it by `fedpeft server start`.")
    with folders.alone(run):
        on_event({"event": "folder", "path": str(run), "given": True})
        identity.compare_versions(run)
        records.cache_clear()
        return _go(config, run, on_event)


def _go(config: Config, run: Path, on_event: OnEvent) -> dict[str, Any]:
    text = configs.to_yaml(config)
    world.cache_clear()  # an earlier run of this process may have had this folder
    here = world(text, run)
    server = checkpoint.latest(run / "checkpoints")
    recorder = Recorder(run / "metrics.jsonl")
    personal = bool(here.strategy.keeps)
    if isinstance(here.strategy, ClientDP):
        here.strategy.ledger = run / "ledger" / "server.jsonl"

    def record(event: dict[str, Any]) -> None:
        if event["event"] == "round":
            event = {**event, **guarantee.spent(here, event["round"])}
        recorder.record(event)
        on_event(event)

    if server is None:
        recorder.path.unlink(missing_ok=True)
        server = here.start
        record(
            {
                "event": "start",
                "strategy": config.strategy.name,
                "engine": config.run.engine,
                "seed": config.run.seed,
                "clients": config.data.count,
                "rounds": config.run.rounds,
                "trainable_parameters": trainable(here),
                "personalised": personal,
                "test_fingerprint": here.test.fingerprint,
                "skipped": [entry.tree() for entry in here.skipped],
            }
        )
        record({"event": "evaluate", "round": 0, **score(here, server)})
        record({"event": "baselines", **comparators.constant(here), **(trained_elsewhere(here) if config.run.baselines
                                                                       else {})})
    else:
        recorder.resume(server.round, sequence.unfinished(server))
        on_event({"event": "resume", "round": server.round, "rounds": config.run.rounds})
    rules = rules_of(config)

    def after_round(state: ServerState) -> None:
        if state.round % config.run.checkpoint_every == 0 or state.round == config.run.rounds:
            checkpoint.write(run / "checkpoints", state)

    tasks = config.continual.body is not None

    def rounds(grid: Grid, state: ServerState, until: int) -> ServerState:
        return here.strategy.run(grid, state, replace(rules, rounds=until), record=record, after_round=after_round,
                                 evaluate=None if personal else partial(score, here))

    def play(state: ServerState, grid: Grid) -> ServerState:
        if not tasks:
            return rounds(grid, state, config.run.rounds)
        ask = partial(exchange.sums, grid, wire.PACKED, sequence.required(here.strategy), rules, record)
        return sequence.run(here, state, partial(rounds, grid), ask, record, after_round)

    if server.round < config.run.rounds or (tasks and not sequence.complete(here, server)):
        server = _with_grid(config, text, run, partial(play, server))
    record({"event": "end", "round": server.round})
    return finish(here, server, run)


def rules_of(config: Config) -> Rules:
    """How the rounds of a simulation are run."""
    return Rules(
        rounds=config.run.rounds,
        seed=config.run.seed,
        clients=config.data.count,
        clients_per_round=config.run.clients_per_round,
        deadline_s=config.run.deadline_s,
        quorum=config.run.quorum,
        max_update_norm=config.run.max_update_norm,
        evaluate_every=config.run.evaluate_every,
        evaluate_clients=config.data.holdout > 0,
        secagg=terms.exchange(config),
    )


def trained_elsewhere(here: World) -> dict[str, Any]:
    """Test accuracies of what needs no federation: logistic regressions, and in a sequence the frozen model's head."""
    return {**baselines(here), **attempted("frozen_head", partial(comparators.frozen_head, here))}


def _absolute(config: Config) -> None:
    """Local paths as absolute ones, so that the run can be resumed from any folder."""
    for section, key, table in (
        (config.data, "source", "datasets"),
        (config.data, "test", "datasets"),
        (config.data, "split", ""),
        (config.model, "name", ""),
        (config.privacy, "policy", ""),
    ):
        value = getattr(section, key)
        known = registry.names(table) if table else loading.EMBEDDED
        if value and value not in known and Path(value).exists():
            setattr(section, key, str(Path(value).absolute()))


def _with_grid(config: Config, text: str, run: Path, play: Callable[..., ServerState]) -> ServerState:
    nodes: dict[int, dict[str, bool | int | float | str]] = {
        index + 2: {"partition-id": index, "num-partitions": config.data.count}
        for index in range(config.data.count)
    }
    share = 1 if config.run.faults else 256  # a client that hangs must not take others with it
    options: dict[str, Any] = {"start": start_ray(config.run.workers)} if config.run.engine == "ray" else {}
    try:
        grid = LocalGrid(partial(make_app, text, run), nodes, config.run.workers, config.run.threads, share, **options)
        try:
            return play(grid)
        finally:
            grid.close()
    finally:
        if config.run.engine == "ray":
            stop_ray()


def make_app(text: str, run: Path) -> ClientApp:
    """The ClientApp of a run, its world loaded; picklable by name for worker processes and Ray actors."""
    with said_elsewhere():
        local = world(text, run).local
    names = list(local.train_data)

    def name_of(context: Context) -> str:
        return names[int(context.node_config["partition-id"])]

    mods = [faults.mod(local.config.run.faults, name_of)] if local.config.run.faults else []
    return client_app(lambda: local, name_of, mods)


def score(here: World, server: ServerState) -> dict[str, float]:
    """Accuracy and loss of the global model on the server's test set; in a sequence, on that of the classes so far."""
    if here.config.continual.body is not None:
        return sequence.score(here, server)
    here.local.model.write(server.adapter)
    result = evaluate(here.local.model, here.test_encoded)
    return {**{key: value for key, value in result.items() if key != "num-examples"},
            "test_records": int(result["num-examples"])}


def trainable(here: World) -> int:
    """Parameters that a client trains over the run's rounds."""
    roles = {
        role for number in range(2) for role in here.strategy.trained(ServerState(here.start.adapter, round=number))
    }
    return here.start.adapter.select(roles).parameters


def finish(here: World, server: ServerState, run: Path) -> dict[str, Any]:
    """Write the adapter folders, summary, plots and report.

    Raises:
        RunError: every round was dropped, so there is nothing to write.
    """
    if 0 < server.round == server.numbers.get(DROPPED, 0):
        last = [event["reason"] for event in read(run / "metrics.jsonl") if event["event"] == "round_dropped"][-1:]
        raise RunError(f"none of the {server.round} rounds had a result. {' '.join(last)}")
    config, base = here.config, here.local.model.base
    pooled = "classifier" in base.heads and not hasattr(base.backbone, "classifier")
    options: dict[str, Any] = {"base": base.source, "task": config.model.task, "pooled_head": pooled}
    folder.save(flat(here.strategy.before_round(server).adapter), run / "adapter", **options)
    if here.strategy.keeps:
        for client in here.local.train_data:
            task = {**here.strategy.task(server)}
            own, _ = here.local.compose(client, here.strategy.broadcast(server, client), task, before=server.round + 1)
            folder.save(flat(own), run / "adapter" / "clients" / client, **options)
    events = read(run / "metrics.jsonl")
    extra = {
        "skipped": [entry.tree() for entry in here.skipped],
        "owner": split.owners_of(run / "split.json"),
        "privacy": guarantee.section(here),
        "continual": sequence.section(here, server),
        "tta": test_time.describe(config, events),
        "secure_aggregation": terms.describe(config) if config.secagg.enabled else None,
        "wrap": [entry if isinstance(entry, str) else entry["name"] for entry in config.strategy.wrap],
    }
    summary = summarise(events, configs.to_tree(config), extra)
    write_bytes(run / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    try:
        report.write(run)
    except OSError:  # `resume` of the finished run writes it, once there is room
        raise
    except Exception as error:  # the run is complete and on the disk: a page about it must not end it
        log.warning("the report could not be written: %s: %s. `fedpeft report %s` writes it again.",
                    type(error).__name__, error, run)
    return {**summary, "out": str(run)}
