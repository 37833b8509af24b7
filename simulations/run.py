"""One simulated run from config to adapter folder, and its resumption: `fedpeft simulate` and `fedpeft resume`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedpeft import config as configs
from fedpeft import extras, folders, registry
from fedpeft.clients.app import Local, client_app
from fedpeft.config import Config
from fedpeft.data import from_python
from fedpeft.data.skipped import said_elsewhere
from fedpeft.data.wording import TEMPLATES
from fedpeft.errors import InputError
from fedpeft.files import write_bytes
from fedpeft.record.metrics import Recorder
from fedpeft.record.result import Result
from fedpeft.run import comparators, guarantee, identity, loop
from fedpeft.run.dtype import settle_dtype
from fedpeft.run.ranks import settle_ranks
from fedpeft.run.world import World, find_device, load_records, load_world, settle_clients
from fedpeft.simulations import faults
from fedpeft.simulations.baselines import attempt_fit, baselines
from fedpeft.simulations.grid import LocalGrid
from fedpeft.simulations.ray_engine import start_ray, stop_ray
from fedpeft.simulations.trained_baselines import trained_baselines
from fedpeft.strategies import wire
from fedpeft.uncollected import set_apart


def simulate(
    source: str | Path | dict[str, Any],
    overrides: Sequence[str] | dict[str, Any] = (),
    out: str | Path | None = None,
    on_event: loop.Listener = lambda event: None,
    data: from_python.Source | None = None,
    test: from_python.Source | None = None,
) -> Result:
    """Run a simulation from its first round.

    Args:
        source: a config file, the name of a shipped config, or a mapping.
        overrides: `key=value` strings or a mapping of dotted keys.
        out: the run folder, new or empty. Default is runs/NAME-1, -2, ..., the one after the highest that is there,
            with NAME = <config>-<strategy>-seed<seed>; runs/NAME is a link to the newest.
        on_event: receives every event that goes to metrics.jsonl, and before them `folder` with its `path`,
            `given` by the caller or not.
        data: records to use in place of `data.source`: a pandas DataFrame, a `datasets.Dataset`, a `DatasetDict` with
            train and test, or a torch Dataset of dicts, which is written into the run's folder once.
        test: the same in place of `data.test`.

    Returns:
        The content of summary.json, and `out`; its rounds as a table, and more.

    Raises:
        InputError: the config, the data or the model cannot be used; nothing was trained.
        RunError: the run failed; it can be resumed.
    """
    config = configs.load(source, overrides)
    if config.run.engine == "sites":
        raise InputError("run.engine=sites: real sites are run by `fedpeft server run`. Set run.engine=cohort or ray.")
    extras.require_of_run(config)
    _make_absolute(config)
    load_records.cache_clear()  # files may have changed since an earlier run of this process
    handed = data is not None or test is not None
    if not handed:  # ahead of the folder, so that a config that is refused leaves none behind
        faults.check(config.run, settle_clients(config, Path("runs/new" if out is None else out)))
    name = f"{'run' if isinstance(source, dict) else Path(source).stem}-{config.strategy.name}-seed{config.run.seed}"
    with folders.new(out, Path("runs") / name, hint=", or go on with `fedpeft resume {}`") as made:
        run = made.path
        on_event({"event": "folder", "path": str(run), "given": out is not None})

        def tell(event: dict[str, Any]) -> None:
            # Not before: a run that was refused must not take the link from the one before it.
            if event["event"] == "start":
                made.point()
            on_event(event)

        try:
            if handed:
                from_python.write(config.data, run, data, test)
                faults.check(config.run, settle_clients(config, run))
            _write_resolved(config, run)
            identity.begin(run, str(find_device(config.run.device)))
            return _run_world(config, run, tell)
        except InputError:
            if not (run / "metrics.jsonl").exists():  # nothing was trained: the command, mended, may use the folder
                if handed:
                    shutil.rmtree(run / from_python.FOLDER, ignore_errors=True)
                made.undo("resolved.yaml", identity.FILE, "split.json", folders.LOCK)
            raise


def _write_resolved(config: Config, run: Path) -> None:
    """Write the config with everything that it leaves open: a resumed run must not see a shipped config or a default
    that has changed since.
    """
    said = [text for text in (settle_dtype(config), settle_ranks(config, run)) if text]
    write_bytes(run / "resolved.yaml", "\n".join([*(f"# {text}" for text in said), configs.to_yaml(config)]).encode())


def resume(run: str | Path, on_event: loop.Listener = lambda event: None) -> Result:
    """Go on with a run after its last complete checkpoint; a finished run is only reported again.

    Raises:
        InputError: the folder holds no run, another process works in it, or the base or the data are others now.
        RunError: the run failed; it can be resumed.
    """
    run = folders.run_folder(run)
    config = configs.load(run / "resolved.yaml")
    if config.run.engine == "sites":
        raise InputError(f"{run}: a run of real sites; its coordinator goes on with it by `fedpeft server start`.")
    unlearned = identity.fingerprint_of(run, identity.UNLEARNING)
    if unlearned is not None and (not unlearned["reruns"] or (run / "summary.json").is_file()):
        raise InputError(
            f"{run}: what `fedpeft unlearn` has made, which is finished: rounds from here on would replace it. A new "
            f"run with adapter.start={run / 'adapter'} trains on from it."
        )
    extras.require_of_run(config)
    with folders.alone(run):
        on_event({"event": "folder", "path": str(run), "given": True})
        identity.compare_versions(run)
        load_records.cache_clear()
        return _run_world(config, run, on_event)


def _run_world(config: Config, run: Path, on_event: loop.Listener) -> Result:
    world = load_world(config, run)
    fit = partial(fit_baselines, world)
    open_clients = partial(open_grid, world, run)
    with set_apart():
        return Result(loop.run(world, run, Recorder(run / "metrics.jsonl"), open_clients, on_event, fit))


def fit_baselines(world: World) -> dict[str, Any]:
    """Test accuracies of what needs no federation: logistic regressions, in a sequence the frozen model's head, and
    what `run.trained_baselines` names.
    """
    fitted: dict[str, Any] = {}
    if world.config.run.baselines:
        fitted = {**baselines(world), **attempt_fit("frozen_head", partial(comparators.frozen_head, world))}
    return {**fitted, **trained_baselines(world)}


@dataclass(frozen=True)
class Known(wire.Packed):
    """fedpeft's client app on nodes that this process has made: nobody is asked for a name, as 100,000 would be."""

    nodes: dict[str, int]

    def roster(self, grid: Grid, expected: int | None) -> dict[str, int]:
        """Client name -> node id."""
        return self.nodes


@contextmanager
def open_grid(world: World, run: Path) -> Iterator[loop.Federation]:
    """The clients of this machine, or of a Ray cluster, as long as the rounds last."""
    config = world.config
    nodes: dict[int, dict[str, bool | int | float | str]] = {
        # Node 1 is the server's.
        index + 2: {"partition-id": index, "num-partitions": config.data.count}
        for index in range(config.data.count)
    }
    share = 1 if config.run.faults else 256  # a client that hangs must not take others with it
    make_app = partial(load_app, config, run) if config.run.workers else partial(app_of, world.local)
    options: dict[str, Any] = {"start": start_ray(config.run.workers)} if config.run.engine == "ray" else {}
    try:
        grid = LocalGrid(make_app, nodes, config.run.workers, config.run.threads, share, **options)
        try:
            codec = Known({name: index + 2 for index, name in enumerate(world.local.train_data)})
            yield loop.Federation(grid, codec, True, guarantee.Spent(world).describe_round)
        finally:
            grid.close()
    finally:
        if config.run.engine == "ray":
            stop_ray()


def load_app(config: Config, run: Path) -> ClientApp:
    """The ClientApp of a run in another process; picklable by name for worker processes and Ray actors."""
    with said_elsewhere():
        return app_of(load_world(config, run).local)


def app_of(local: Local) -> ClientApp:
    """The ClientApp of all clients whose records are here, with the faults that the config gives them."""
    names = list(local.train_data)

    def name_of(context: Context) -> str:
        return names[int(context.node_config["partition-id"])]

    mods = [faults.mod(local.config.run.faults, name_of)] if local.config.run.faults else []
    return client_app(lambda: local, name_of, mods)


def _make_absolute(config: Config) -> None:
    """Local paths as absolute ones, so that the run can be resumed from any folder."""
    nothing: tuple[str, ...] = ()
    for section, key, known in (
        (config.data, "source", registry.names("datasets")),
        (config.data, "test", registry.names("datasets")),
        (config.data, "split", nothing),
        (config.data, "template", TEMPLATES),
        (config.model, "name", registry.EMBEDDED),
        (config.adapter, "start", nothing),
        (config.privacy, "policy", nothing),
    ):
        value = getattr(section, key)
        if value and value not in known and Path(value).exists():
            setattr(section, key, str(Path(value).absolute()))
    if config.data.cache is not None:  # which need not exist yet
        config.data.cache = str(Path(config.data.cache).absolute())
