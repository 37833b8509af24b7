"""The server's side of one run: the same rounds as a simulation's, over Flower's Grid, from the last checkpoint on.

python -m fedpeft.deploy.launch run FOLDER PARENT NAME MODE
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fedpeft import config as configs
from fedpeft import folders
from fedpeft.clients.reference import with_reference
from fedpeft.config import Config
from fedpeft.data import source
from fedpeft.data.encode import encode
from fedpeft.data.wording import require_asked
from fedpeft.deploy import envelope, settings
from fedpeft.deploy.build import LEDGER, LaterWorld, bare
from fedpeft.deploy.coordinator.flower import Control
from fedpeft.deploy.coordinator.post import Clerk, Post
from fedpeft.deploy.coordinator.roster import Roster, SiteGrid
from fedpeft.deploy.coordinator.server import put_status
from fedpeft.deploy.envelope import Envelope
from fedpeft.deploy.processes import NO_ROOM
from fedpeft.errors import InputError, RunError
from fedpeft.files import explain_error, write_bytes
from fedpeft.flower import empty_run
from fedpeft.record.metrics import Recorder
from fedpeft.run import identity, loop
from fedpeft.run.world import World
from fedpeft.state import Needs
from fedpeft.strategies.build import build as build_strategy

log = logging.getLogger("fedpeft")
ORPHAN_S = 10.0
TOLD = "told.json"  # in a run's folder: the classes and the base model that its sites were told of
FULL = (errno.ENOSPC, errno.EDQUOT)


def main(folder: Path, name: str, mode: str) -> None:
    """Work on a run until it is done, and say how it ended in its folder."""
    server = settings.server(folder)
    run, insecure = server.run(name), mode == "insecure"
    try:
        # A process of a coordinator that was killed misses it soon. Until then sites' calls are not for this one.
        with folders.alone(run, patience_s=ORPHAN_S), closing(Control(server, insecure)) as control:
            post = Post(empty_run(settings.number_of(name)), control.online, run)
            Clerk(folder, post)
            play(run, post, None if insecure else server.sites)
            put_status(run, state="done")
    except Exception as error:  # whatever it is, the run's folder must say so, or it would be tried for ever
        reason, pauses = explain(error), isinstance(error, OSError) and error.errno in FULL
        if not reason:
            log.exception("run %s", name)
            reason = str(error) or type(error).__name__
        log.error("run %s %s: %s", name, "pauses" if pauses else "failed", reason)
        # One for which there is no room is started again until there is: its last checkpoint is whole.
        if pauses:
            raise SystemExit(NO_ROOM) from error
        put_status(run, state="failed", reason=reason)


def explain(error: Exception) -> str:
    """What went wrong, as a sentence; empty where only a traceback can say it."""
    if isinstance(error, OSError):
        return explain_error(error)
    return str(error) if isinstance(error, InputError | RunError) else ""


def play(run: Path, grid: Post, registered: Callable[[], dict[str, str]] | None) -> dict[str, Any]:
    """All rounds of a run that are left.

    Args:
        registered: sites that may take part; None asks each node for its name (without authentication).
    """
    config = configs.load(run / "resolved.yaml")
    world, cover = open_world(config, run)
    recorder = Recorder(run / "metrics.jsonl")
    # Whatever was sent meanwhile: no answer is read before the base model is known to be the run's.
    sites = SiteGrid(grid, cover, config.run.deadline_s, recorder.record, grid.wait, lambda: world.local)
    roster = Roster(sites, registered, partial(waiting, run))
    federation = loop.Federation(sites, roster, False, lambda event: sites.transferred_s())
    return loop.run(world, run, recorder, lambda: nullcontext(federation), tell)


def open_world(config: Config, run: Path) -> tuple[World, Envelope]:
    """The world of a run, and what comes with each of its messages.

    A run that goes on has both from its folder and its checkpoint, so that the next round is sent before the model is
    loaded. It is loaded, and compared with what the run began with, when it is first asked for.
    """
    file = run / TOLD
    if not file.exists():
        world, cover = load_world(config, run)
        write_bytes(file, json.dumps({"labels": cover.labels, "base": cover.base}).encode())
        return world, cover
    told = json.loads(file.read_text())
    cover = Envelope(run.name, configs.to_yaml(config), tuple(told["labels"]), told["base"])

    def load() -> World:
        world, found = load_world(config, run)
        if found != cover:
            raise InputError(f"{file}: the run's sites were told of other classes or another base than there are now.")
        return world

    strategy = build_strategy(config, len(cover.labels), ledger=run / LEDGER)
    return LaterWorld(config, strategy, load), cover


def load_world(config: Config, run: Path) -> tuple[World, Envelope]:
    """Model and test set of a run, which must be those that it began with, and what comes with each of its messages."""
    world, labels = world_of(config, run)
    tests = {} if config.data.test is None else {"test records": world.test.fingerprint}
    identity.hold(run, {"base model": identity.of_base(world.local.model.base, config), **tests}, config)
    cover = Envelope(
        run.name, configs.to_yaml(config), tuple(labels), envelope.base_fingerprint(world.local.model.base, config)
    )
    # Here, once: what sites would refuse must not cost a round of all of them.
    cover.require()
    if kept := say_what_is_kept(world):
        log.info(kept)
    return world, cover


def say_what_is_kept(world: World) -> str:
    """How much of the sites' updates a rule has in memory at once that needs more than their sum; else empty.

    A sum is added up from the disk (`strategies.wire`).
    """
    strategy, config = world.strategy, world.config
    if strategy.needs is Needs.SUM:
        return ""
    asked = config.run.clients_per_round or config.data.count
    one = 2 * strategy.broadcast(world.start, "").select(strategy.uploads(world.start)).nbytes
    return (
        f"{type(strategy).__name__} looks at single updates: it may have those of all {asked} sites in memory at once, "
        f"in float64 {asked} x {one / 1e6:.3g} MB = {asked * one / 1e6:.3g} MB."
    )


def tell(event: dict[str, Any]) -> None:
    """Log after which round a run goes on; other events are logged where they happen."""
    if event["event"] == "resume":
        log.info("goes on after round %d", event["round"])


def waiting(run: Path, text: str | None) -> None:
    """Write down what the run waits for; None when it goes on."""
    put_status(run, **({"state": "waiting", "reason": text} if text else {"state": "running"}))


def world_of(config: Config, run: Path) -> tuple[World, list[str]]:
    """Model and strategy of a run, with the coordinator's test set if it has one, and the names of the classes."""
    task, test, found = config.model.task, None, None
    if config.data.test is not None:
        test = source.whole(config.data.test, "data.test", config.data, task, test=True)
        require_asked(config, test.wording)
        found = test.label_names
    labels = envelope.classes(config, found)
    world = bare(config, run, labels)
    if test is not None:
        model = world.local.model
        encoded = encode(test, model.base.processor, task, config.model.max_length)
        world = replace(world, test=test, test_encoded=with_reference(config, model, encoded))
    return world, labels
