"""The server's side of one run: the same rounds as a simulation's, over Flower's Grid, from the last checkpoint on.

    python -m fedpeft.deploy.launch run FOLDER PARENT NAME   (FEDPEFT_TASK_TOKEN: Flower's token for the task)
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from flwr.common.serde import run_from_proto
from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest
from flwr.serverapp import Grid
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from fedpeft import config as configs
from fedpeft import folders
from fedpeft.config import Config
from fedpeft.data import source
from fedpeft.data.encode import encode
from fedpeft.deploy import envelope, settings
from fedpeft.deploy.build import bare
from fedpeft.deploy.coordinator.roster import Roster, SiteGrid
from fedpeft.deploy.coordinator.server import ENDED, get_status, put_status
from fedpeft.errors import InputError, RunError
from fedpeft.record import checkpoint
from fedpeft.record.metrics import Recorder
from fedpeft.run import comparators, identity, sequence
from fedpeft.run.world import World
from fedpeft.simulations.run import finish, score, trainable
from fedpeft.state import RoundFailed, Rules, ServerState
from fedpeft.strategies.secagg import terms
from fedpeft.strategies.sequence import exchange
from fedpeft.strategies.wrappers.client_dp import ClientDP

log = logging.getLogger("fedpeft")
PATIENCE = 5  # times that one round is tried before the run is given up
PAUSE_S = 10.0
ORPHAN_S = 10.0
T = TypeVar("T")


def main(folder: Path, name: str, mode: str) -> None:
    """Work on a run until it is done, and say how it ended in its folder."""
    server = settings.server(folder)
    run, insecure = server.run(name), mode == "insecure"
    token = os.environ.pop("FEDPEFT_TASK_TOKEN")
    root = None if insecure else (folder / "ca.crt").read_bytes()
    grid = HttpGrid(server.control, insecure, root, token=token)
    client = grid._runtime_client
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    answer = client.PullTaskInput(PullTaskInputRequest())
    TaskIdentity.task_id, TaskIdentity.run_id = answer.task_id, answer.run.run_id
    TaskIdentity.node_id = answer.context.node_id
    grid.set_run(run_from_proto(answer.run))
    reason = ""
    try:
        play(run, grid, None if insecure else server.sites)
        put_status(run, state="done")
    except Exception as error:  # whatever it is, the run's folder must say so, or it would be tried for ever
        if not isinstance(error, InputError | RunError):
            log.exception("run %s", name)
        reason = str(error) or type(error).__name__
        log.error("run %s failed: %s", name, reason)
        if get_status(run)["state"] not in ENDED:
            put_status(run, state="failed", reason=reason)
    client.PushTaskOutput(PushTaskOutputRequest(sub_status="failed" if reason else "completed", details=reason))
    heartbeat.stop()


def play(run: Path, grid: Grid, registered: Callable[[], dict[str, str]] | None) -> dict[str, Any]:
    """All rounds of a run that are left.

    Args:
        registered: sites that may take part; None asks each node for its name (without authentication).
    """
    with folders.alone(run, patience_s=ORPHAN_S):  # a process of a coordinator that was killed misses it soon
        return _play(run, grid, registered)


def _play(run: Path, grid: Grid, registered: Callable[[], dict[str, str]] | None) -> dict[str, Any]:
    config = configs.load(run / "resolved.yaml")
    here, labels = world_of(config, run)
    tests = {} if config.data.test is None else {"test records": here.test.fingerprint}
    identity.hold(run, {"base model": identity.of_base(here.local.model.base, config), **tests}, config)
    if isinstance(here.strategy, ClientDP):
        here.strategy.ledger = run / "ledger" / "server.jsonl"
    cover = envelope.Envelope(run.name, configs.to_yaml(config), tuple(labels),
                              envelope.base_fingerprint(here.local.model.base, config))
    cover.require()
    recorder = Recorder(run / "metrics.jsonl")
    sites = SiteGrid(grid, cover, config.run.deadline_s, recorder.record)
    roster = Roster(sites, registered, partial(waiting, run))
    server = checkpoint.latest(run / "checkpoints")
    tested = config.data.test is not None and not here.strategy.keeps
    if server is None:
        recorder.path.unlink(missing_ok=True)
        server = here.start
        recorder.record({"event": "start", "strategy": config.strategy.name, "engine": "sites",
                         "seed": config.run.seed, "clients": config.data.clients, "rounds": config.run.rounds,
                         "trainable_parameters": trainable(here), "personalised": bool(here.strategy.keeps),
                         "test_fingerprint": here.test.fingerprint if len(here.test) else None})
        if config.data.test is not None:
            recorder.record({"event": "evaluate", "round": 0, **score(here, server)})
            recorder.record({"event": "baselines", **comparators.constant(here)})
    else:
        recorder.resume(server.round, sequence.unfinished(server))
        log.info("goes on after round %d", server.round)
    server = rounds(config, here, server, sites, roster, recorder, run, tested)
    recorder.record({"event": "end", "round": server.round})
    return finish(here, server, run)


def rounds(config: Config, here: World, server: ServerState, sites: SiteGrid, roster: Roster, recorder: Recorder,
           run: Path, tested: bool) -> ServerState:
    """The rounds, one call of the strategy each: the sites are asked for anew, so that one may join at any time."""
    chosen = config.run
    rules = Rules(rounds=chosen.rounds, seed=chosen.seed, clients_per_round=chosen.clients_per_round,
                  deadline_s=chosen.deadline_s, quorum=chosen.quorum, max_update_norm=chosen.max_update_norm,
                  secagg=terms.exchange(config))
    wanted = config.data.count

    def after_round(state: ServerState) -> None:
        if state.round % chosen.checkpoint_every == 0 or state.round == chosen.rounds:
            checkpoint.write(run / "checkpoints", state)

    def record(event: dict[str, Any]) -> None:
        recorder.record({**event, **sites.transferred_s()} if event["event"] == "round" else event)

    def play(server: ServerState, until: int) -> ServerState:
        while server.round < until:
            number = server.round + 1
            due = number % chosen.evaluate_every == 0 or number == chosen.rounds
            asked = min(wanted, chosen.clients_per_round or wanted)
            needed = wanted if number == 1 else math.ceil(rules.quorum * asked)
            one = replace(rules, rounds=number, clients=needed, evaluate_clients=due and config.data.holdout > 0)
            server = patiently(recorder, number, partial(
                here.strategy.run, sites, server, one, codec=roster, record=record,
                evaluate=partial(score, here) if due and tested else None, after_round=after_round))
        return server

    def ask(number: int, *what: Any) -> exchange.Answers:
        quorum = replace(rules, clients=math.ceil(rules.quorum * wanted))
        learning = sequence.required(here.strategy)
        return patiently(recorder, number, partial(
            exchange.sums, sites, roster, learning, quorum, record, number, *what))

    if config.continual.body is None:
        return play(server, chosen.rounds)
    return sequence.run(here, server, play, ask, record, after_round)


def patiently(recorder: Recorder, number: int, act: Callable[[], T]) -> T:
    """What the act returns; a round that failed is tried again, after a pause and a few times."""
    failures = 0
    while True:
        try:
            return act()
        except RoundFailed as error:
            failures += 1
            recorder.record({"event": "round_failed", "round": number, "reason": str(error)})
            if failures == PATIENCE:
                raise
            log.warning("%s It is tried again in %g s.", error, PAUSE_S)
            time.sleep(PAUSE_S)


def waiting(run: Path, text: str | None) -> None:
    """Write down what the run waits for; None when it goes on. A run that was stopped stays so."""
    if get_status(run)["state"] not in ENDED:
        put_status(run, **({"state": "waiting", "reason": text} if text else {"state": "running"}))


def world_of(config: Config, run: Path) -> tuple[World, list[str]]:
    """Model and strategy of a run, with the coordinator's test set if it has one, and the names of the classes."""
    task, test, found = config.model.task, None, None
    if config.data.test is not None:
        test = source.whole(config.data.test, "data.test", config.data, task, test=True)
        found = test.label_names
    labels = envelope.classes(config, found)
    here = bare(config, run, labels)
    if test is not None:
        processor = here.local.model.base.processor
        here = replace(here, test=test, test_encoded=encode(test, processor, task, config.model.max_length))
    return here, labels


