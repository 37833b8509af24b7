"""The coordinator's commands: init, add-site, sites, run, status, logs, stop, fetch."""

from __future__ import annotations

import itertools
import json
import logging
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

from fedpeft import config as configs
from fedpeft import extras, folders, foreign
from fedpeft.config import shortened, values
from fedpeft.deploy import address, keys, settings
from fedpeft.deploy.settings import Server, ServerSettings
from fedpeft.errors import InputError, RunError
from fedpeft.files import write_bytes
from fedpeft.record import metrics

log = logging.getLogger("fedpeft")
RUNNING = "running.json"  # the lock of a coordinator's folder
WARNED_DAYS = 30
ENDED = ("done", "failed", "stopped")


def init(
    path: Path, host: str, port: int, control_port: int, listen: str, http_port: int | None = None
) -> dict[str, Any]:
    """Make a coordinator's folder: authority, server certificate, settings."""
    host, listen = address.parse_host(host, "--host"), address.parse_listen(listen, "--listen")
    tree = {"host": host, "port": port, "http_port": http_port, "listen": listen, "control_port": control_port}
    configs.build(ServerSettings, tree, "server")
    chosen = {"--port": port, "--control-port": control_port, "--http-port": http_port}
    for flag, other in itertools.combinations(chosen, 2):
        if chosen[flag] == chosen[other]:
            raise InputError(f"{flag} and {other} are both {chosen[flag]}.")
    with folders.filled(path, "DIR") as draft:  # whole or not at all, whatever the disk says
        draft.parent.chmod(0o700)
        keys.certificates(draft, host)
        keys.write_mode(draft / "secret", secrets.token_bytes(32), keys.PRIVATE)
        for name in ("sites", "runs", "logs"):
            (draft / name).mkdir()
        write_bytes(draft / "server.yaml", values.written(tree).encode())
        folder = draft.parent
    return {
        "folder": str(folder),
        "fleet": address.join(host, port),
        "ca": str(folder / "ca.crt"),
        "next": f"give ca.crt to every site; fedpeft server start {path}",
    }


def renew(path: Path) -> dict[str, Any]:
    """Make the server's certificate anew, for the host that server.yaml names now; no key changes."""
    server = settings.server(path)
    authority_too = keys.renew(server.path, server.settings.host)
    then = [f"stop the coordinator and start it again: fedpeft server start {path}"]
    if authority_too:
        then.append("give the new ca.crt to every site; the old one is good until its own end")
    return {
        "certificate": str(server.path / "server.crt"),
        "days": round(keys.days_left(server.path / "server.crt")),
        "next": "; ".join(then),
    }


def require_certificates(server: Server) -> None:
    """Refuse certificates that have ended; warn of those that end soon.

    Raises:
        InputError: which, and what to do.
    """
    for name in ("server.crt", "ca.crt"):
        days = keys.days_left(server.path / name)
        remedy = f"Make another: fedpeft server renew {server.path}"
        if days <= 0:
            raise InputError(f"{server.path / name}: it ended {-days:.0f} days ago; no site trusts it. {remedy}")
        if days < WARNED_DAYS:
            log.warning("%s ends in %.0f days. %s", server.path / name, days, remedy)


def add_site(path: Path, name: str, public_key: str) -> dict[str, Any]:
    """Let a site in; a coordinator that runs does so within seconds. A new key replaces the old one."""
    server = settings.server(path)
    settings.require_name(name, "NAME")
    line = keys.line(keys.public_key(public_key))
    owner = next((other for other, known in server.sites().items() if known == line and other != name), None)
    if owner:
        raise InputError(f"PUBLIC_KEY: it is the key of site {owner}; every site has its own.")
    write_bytes(server.path / "sites" / f"{name}.pub", f"{line}\n".encode())
    return {"site": name, "running": state(server) is not None}


def sites(path: Path) -> dict[str, Any]:
    """Every site that was added, whether it is connected, and until when, in unix seconds, it was one that is not."""
    server = settings.server(path)
    running = state(server)
    known: dict[str, Any] = {}
    if running:
        from fedpeft.deploy.coordinator.flower import connect_once

        with connect_once(server, running["insecure"]) as control:
            known = {node.name: node for node in control.nodes()}
    rows: list[dict[str, Any]] = [{"name": name, "status": "unknown", "online_until": None} for name in server.sites()]
    for row in rows:
        if node := known.get(row["name"]):
            away = node.status == "offline" and node.online_until > 0
            row |= {"status": node.status, "online_until": node.online_until if away else None}
    return {"running": bool(running), "sites": rows}


def await_sites(path: Path, count: int, patience_s: float = 120.0, poll_s: float = 0.5) -> dict[str, Any]:
    """What `sites` says as soon as the coordinator answers and `count` of them are connected.

    Raises:
        InputError: fewer sites were added.
        RunError: that has not come about within `patience_s`.
    """
    added = len(settings.server(path).sites())
    if count > added:
        raise InputError(
            f"--wait: {count} sites, but {added} were added. Add one with `fedpeft server add-site {path} NAME KEY`."
        )
    until = time.monotonic() + patience_s
    while True:
        try:
            seen = sites(path)
            away = [row["name"] for row in seen["sites"] if row["status"] != "online"]
            online = len(seen["sites"]) - len(away)
            if seen["running"] and online >= count:
                return seen
            missing = (
                f"{online} of {count} sites are connected; not {', '.join(away)}"
                if seen["running"]
                else f"{path}: the coordinator is not running"
            )
        except RunError as error:  # it has begun, and does not answer yet
            missing = str(error)
        if time.monotonic() > until:
            raise RunError(f"--wait: after {patience_s:g} s, {missing}.")
        time.sleep(poll_s)


def run(path: Path, config: str, overrides: list[str]) -> dict[str, Any]:
    """Submit a run: check its config and give it a folder; the coordinator starts what it finds.

    Noise comes from the operating system of each site. `privacy.randomness=seeded` among the overrides asks for noise
    that can be repeated; a site obeys only if its policy allows it.

    Raises:
        InputError: the config cannot be used with sites; nothing was started.
        RunError: the coordinator is not running.
    """
    server = settings.server(path)
    running = state(server)
    if running is None:
        raise RunError(f"{path}: the coordinator is not running. Start it with `fedpeft server start {path}`.")
    count = len(server.sites())
    given = configs.parse_overrides(overrides)
    if not running["insecure"] and not count and "data.clients" not in given:
        raise InputError(f"{path}: no site has been added. Add one with `fedpeft server add-site {path} NAME KEY`.")
    forced = {"run.engine": "sites", "run.baselines": False}
    given = {"data.clients": count or 1, "privacy.randomness": "os", **given, **forced}
    checked = configs.load(config, shortened.rounds(config, given))
    extras.require_of_run(checked)
    if checked.model.dtype == "auto":
        checked.model.dtype, checked.model.batched_attention = "float32", None
        log.warning(
            "model.dtype=auto: float32. Each site computes on a machine of its own, and all must have one base; set "
            "model.dtype=bfloat16 if all sites are faster in it."
        )
    if unequal := checked.unequal_ranks.partition("=")[0]:
        raise InputError(f"{unequal}: given by the order of simulated clients; sites have names.")
    if checked.run.faults:
        raise InputError("run.faults: a simulation only.")
    if checked.continual.body is not None and checked.data.test is None:
        raise InputError(
            f"continual.body={checked.continual.body}: what is forgotten is counted on the coordinator's "
            "own test set. Set data.test."
        )
    checked.data.test, checked.adapter.start = map(settings.make_absolute, (checked.data.test, checked.adapter.start))
    foreign.read_yaml(configs.to_yaml(checked), "CONFIG")  # as every site will
    name = f"{Path(config).stem}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    settings.require_name(name, "CONFIG")
    draft = server.runs / f".{name}"
    try:
        draft.mkdir(parents=True)
        write_bytes(draft / "resolved.yaml", configs.to_yaml(checked).encode())
        put_status(draft, state="submitted")
        draft.rename(server.runs / name)  # whole or not at all: the coordinator takes what it finds
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return {"run": name, "folder": str(server.runs / name), "rounds": checked.run.rounds, "sites": checked.data.clients}


def status(path: Path, name: str | None = None) -> dict[str, Any]:
    """Sites, and all runs or one: state, rounds, the last round's clients, who was left out and why."""
    server = settings.server(path)
    chosen = [server.run(name)] if name else server.all_runs()
    return {**sites(path), "runs": [_run_status(folder) for folder in chosen]}


def logs(path: Path, name: str | None) -> str:
    """The log of a run, or that of what sites reach."""
    server = settings.server(path)
    file = server.run(name) / "log.txt" if name else server.path / "logs" / "fleet.log"
    return file.read_text(errors="replace") if file.exists() else ""


def stop(path: Path, name: str) -> dict[str, Any]:
    """Stop a run; its last checkpoint and its record stay."""
    server = settings.server(path)
    folder = server.run(name)
    if not put_status(folder, state="stopped"):
        raise InputError(f"RUN: {folder.name} has ended ({get_status(folder)['state']}).")
    return {"run": folder.name, "state": "stopped"}


def fetch(path: Path, name: str, to: Path) -> dict[str, Any]:
    """Copy a run's results: adapter, metrics, summary, report.

    Raises:
        InputError: the target is not empty, or the run has not finished.
    """
    folder = settings.server(path).run(name)
    if get_status(folder)["state"] != "done":
        raise InputError(f"RUN: {folder.name} is {get_status(folder)['state']}, not done; there is no adapter yet.")
    wanted = ("adapter", "plots", "metrics.jsonl", "summary.json", "report.html", "resolved.yaml")
    with folders.filled(to, "--to") as draft:
        for source in (folder / entry for entry in wanted):
            if source.is_dir():
                shutil.copytree(source, draft / source.name)
            elif source.exists():
                shutil.copy2(source, draft / source.name)
    return {"run": folder.name, **{entry: str(to / entry) for entry in wanted if (to / entry).exists()}}


def wait(path: Path, name: str, on_event: Any, poll_s: float = 0.5) -> dict[str, Any]:
    """Follow a run until it has ended, giving each event once; its status.

    Raises:
        RunError: it failed or was stopped.
    """
    folder = settings.server(path).run(name)
    seen = 0
    while True:
        # Asked before the events are read: the last of them are written before the state.
        ended = get_status(folder)["state"] in ENDED
        events = events_of(folder)
        for event in events[seen:]:
            on_event(event)
        seen = len(events)
        if ended:
            break
        time.sleep(poll_s)
    last = _run_status(folder)
    if last["state"] != "done":
        raise RunError(f"{folder.name}: {last['state']}. {last.get('reason') or ''}".strip())
    return last


# State on the disk ------------------------------------------------------------------------------------------------


def state(server: Server) -> dict[str, Any] | None:
    """What the running coordinator wrote about itself; None if none is running."""
    import fcntl

    try:
        with (server.path / RUNNING).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # the coordinator holds it as long as it lives
        return None
    except FileNotFoundError:
        return None
    except BlockingIOError:
        found: dict[str, Any] = json.loads((server.path / RUNNING).read_text())
        return found


def put_status(folder: Path, **values: Any) -> bool:
    """Replace a run's status.json, whole or not at all; what is not given is gone. False if the run has ended already.

    A command and the run's process write it, so one waits for the other: a stop must not be written over.
    """
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if get_status(folder)["state"] in ENDED:
            return False
        write_bytes(folder / "status.json", (json.dumps(values) + "\n").encode())
        return True
    finally:
        os.close(handle)


def get_status(folder: Path) -> dict[str, Any]:
    """`state`: submitted, running, waiting, done, failed or stopped, and what else is known."""
    try:
        found: dict[str, Any] = json.loads((folder / "status.json").read_text())
        return found
    except (OSError, ValueError):
        return {"state": "submitted"}


def events_of(folder: Path) -> list[dict[str, Any]]:
    """What a run, perhaps one at work, has recorded."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return []
    text = file.read_text(errors="replace")
    # The run may be writing the line after the last newline.
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _run_status(folder: Path) -> dict[str, Any]:
    config, events = configs.load(folder / "resolved.yaml"), events_of(folder)
    rounds = [event for event in events if event["event"] == "round"]
    last = rounds[-1] if rounds else {}
    shown: dict[str, Any] = metrics.make_finite(
        {
            "run": folder.name,
            **get_status(folder),
            "round": last.get("round", 0),
            "rounds": config.run.rounds,
            "clients": last.get("clients", []),
            "left_out": last.get("quarantined", {}),
            "seconds": last.get("seconds"),
            "accuracy": last.get("accuracy"),
            "history": [
                {key: event.get(key) for key in ("round", "clients", "quarantined", "seconds", "accuracy")}
                for event in rounds
            ],
        }
    )
    return shown
