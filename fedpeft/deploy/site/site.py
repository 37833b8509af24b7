"""A site's commands: init, check, start."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft import config as configs
from fedpeft import folders, registry
from fedpeft.config import Config, values
from fedpeft.deploy import keys, settings
from fedpeft.deploy.address import parse_endpoint, proxy_of
from fedpeft.deploy.launch import DEBUG
from fedpeft.deploy.processes import Child, end_children, launch_command
from fedpeft.deploy.settings import Site, SiteSettings
from fedpeft.errors import InputError, RunError, Stopped
from fedpeft.files import write_bytes
from fedpeft.foreign import shown

if TYPE_CHECKING:
    from fedpeft.data.records import Records
    from fedpeft.models.base import Base

log = logging.getLogger("fedpeft")
POLL_S = 0.25
RUNNING = "running"  # the lock of a site's folder
LABELS = "labels.json"  # of the last run that this site took part in
SKEW_S = 60.0  # Flower takes clocks that are up to 300 s behind and 5 s ahead
INSECURE = "INSECURE: no TLS and no authentication; whoever is on the way can read and change what is sent."
POLICY = """\
# What this site allows, whatever a coordinator asks. It is read anew for every message. Of max_epsilon, max_rounds and
# records each is set, or named as left open on purpose; they come last, so that a file that is cut off lacks them.
# `fedpeft site policy policy.yaml` says what the file allows.
unit: sample                # every record is protected by DP-SGD; none lets plain training through
max_delta: 1.0e-5
min_noise_multiplier: 0.3
strategies: null            # names that may ask, as [fedsvd, ffa_lora]; null is all
metrics: []                 # beside the update, of: train_loss, loss, accuracy, num-examples, missed_tasks
seeded_noise: false         # true: noise that the coordinator can reproduce, so no privacy; for tests
max_epsilon: 3.0            # of one record, over all runs that this site's ledger counts
max_rounds: 200             # of one run
records: null               # public number of records, where the true one is not to be told
unbounded: [records]        # what is left open on purpose, of: max_epsilon, max_rounds, records
"""


def init(path: Path, name: str, server: str, ca: Path | None, data: str | None, model: str) -> dict[str, Any]:
    """Make a site's folder: its key pair is born here, and only the public half is to be sent away.

    Raises:
        InputError: the folder is not empty, or a value is no good.
    """
    tree: dict[str, Any] = {
        "name": name,
        "server": server,
        "model": settings.make_absolute(model),
        "data": {"source": settings.make_absolute(data or None), "text": None, "image": None, "label": None},
        "device": "auto",
        "threads": 1,
    }
    configs.build(SiteSettings, tree, "site")
    parse_endpoint(server, "--server")
    settings.require_name(name, "--name")
    if ca is not None and not ca.is_file():
        raise InputError(f"--ca: no file {ca}. It is the coordinator's ca.crt.")
    if data is not None and not Path(data).exists():
        _require_made(data)
    with folders.filled(path, "DIR") as draft:  # whole or not at all
        folder = draft.parent
        folder.chmod(0o700)
        line = keys.site_keys(draft)
        if ca is not None:
            shutil.copyfile(ca, draft / "ca.crt")
        write_bytes(draft / "site.yaml", values.written(tree).encode())
        write_bytes(draft / "policy.yaml", POLICY.encode())
    return {
        "folder": str(folder),
        "public_key": line,
        "next": f"send the public key to the coordinator; read {folder}/policy.yaml; fedpeft site check {path}",
    }


def _require_made(data: str) -> None:
    from fedpeft.data import prepare

    known = [*registry.names("datasets"), *prepare.RECIPES]
    if prepare.canonical(data.partition("/")[0]) not in known:
        raise InputError(f"--data: no file or folder {data}, and no data set of these: {', '.join(known)}.")


def check(path: Path) -> dict[str, Any]:
    """Whether the site could take part: a row for each thing that it needs, `ok` and what was seen."""
    site = settings.site(path)
    found: dict[str, Any] = {}

    def row(name: str, look: Callable[[], str]) -> dict[str, Any]:
        try:
            return {"check": name, "ok": True, "seen": look()}
        except Exception as error:  # whatever is wrong, the other checks are to be made too
            return {"check": name, "ok": False, "seen": str(error) or type(error).__name__}

    rows = [
        row("policy", lambda: _check_policy(site)),
        row("keys", lambda: _check_keys(site)),
        row("data", lambda: _check_data(site, found)),
        row("model", lambda: _check_model(site, found)),
        row("records", lambda: _check_records(site, found)),
        row("server", lambda: _check_server(site, found)),
        row("clock", lambda: _check_clock(site, found)),
    ]
    return {"site": site.settings.name, "ok": all(row["ok"] for row in rows), "checks": rows}


def policy(path: Path) -> dict[str, Any]:
    """What a policy file, a site's, or each of a folder of them allows and leaves open.

    Raises:
        InputError: one of them is no policy, or there is none.
    """
    from fedpeft.clients import policy as policies

    path = path / "policy.yaml" if (path / "site.yaml").exists() else path
    files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: no *.yaml in this folder.")
    found = []
    for file in files:
        bounds = policies.load(file)
        found.append({"file": str(file), **policies.allows(bounds), "says": policies.sentences(bounds)})
    return {"policies": found}


def status(path: Path) -> dict[str, Any]:
    """How the site's node does: whether it runs, when the coordinator last answered it, what is in the way."""
    site = settings.site(path)
    file, owed = site.path / "status.json", list((site.path / "owed").glob("*"))
    seen = json.loads(file.read_text()) if file.exists() else {"state": "never started"}
    return {"site": site.settings.name, "running": _is_running(site), **seen, "owed": len(owed)}


def start(path: Path, insecure: bool = False, debug: bool = False) -> None:
    """Run the site until SIGTERM or Ctrl-C.

    Args:
        debug: log where failures happen, and every call that was not answered.

    Raises:
        InputError: the folder is in use, or something is missing in it.
    """
    from fedpeft.clients import policy as policies

    site = settings.site(path)
    # Before any process is there: without a policy nothing may reach the data.
    bounds = policies.load(site.policy)
    if site.settings.data.source is None:
        raise InputError(f"site.data.source: no data are named in {site.path / 'site.yaml'}.")
    if not insecure and not (site.path / "ca.crt").is_file():
        raise InputError(
            f"{site.path}: no ca.crt; it is the coordinator's, and it is what makes sure whom this site talks to."
        )
    with folders.alone(site.path, RUNNING, patience_s=0.5):  # `site check` looks for an instant
        policies.record(bounds)
        if debug:
            log.setLevel(logging.DEBUG)
            os.environ[DEBUG] = "1"  # for the worker
        if insecure:
            log.warning(INSECURE)
        if proxy := proxy_of(parse_endpoint(site.settings.server, "site.server")[0]):
            log.warning("gRPC goes to the coordinator through the proxy of %s.", proxy)
        _start_node(site, insecure)


def _start_node(site: Site, insecure: bool) -> None:
    """The node in a thread, the worker beside it."""
    from fedpeft.deploy.site.link import connect
    from fedpeft.deploy.site.node import Node, Worker

    child = Child("worker", launch_command("worker", site.path), settings.environment(site.path), piped=True)
    worker = Worker(child)
    node = Node(site, connect(site, insecure), worker.ask, registers=insecure)

    def take_part() -> None:
        node.note(state="starting", trouble=None)
        worker.pipe(math.inf)  # a site that is connected is one that can begin
        node.run()

    thread = threading.Thread(target=take_part, daemon=True)
    for scrap in site.path.glob(".*.json.*"):  # of a process that was killed while it wrote
        scrap.unlink()
    try:
        child.start()
        thread.start()
        log.info("site %s started; its coordinator is %s.", site.settings.name, site.settings.server)
        while thread.is_alive():
            thread.join(POLL_S)
            child.keep()
        raise RunError("the site's node ended; the line above says why.")
    except Stopped:
        log.info("site %s stops.", site.settings.name)
    finally:
        node.leave()
        end_children([child])


def _is_running(site: Site) -> bool:
    try:
        with folders.alone(site.path, RUNNING):
            return False
    except InputError:
        return True


# Checks ---------------------------------------------------------------------------------------------------------------


def _check_policy(site: Site) -> str:
    from fedpeft.clients import policy as policies

    bounds = policies.load(site.policy)
    epsilon = "any epsilon" if bounds.max_epsilon is None else f"epsilon up to {bounds.max_epsilon:g}"
    warning = "; SEEDED NOISE IS ALLOWED: no privacy" if bounds.seeded_noise else ""
    left = ", ".join(policies.allows(bounds)["open"]) or "nothing"
    return (
        f"unit {bounds.unit}, {epsilon}, at most {bounds.max_rounds or 'any number of'} rounds; left open: "
        f"{left}{warning}"
    )


def _check_keys(site: Site) -> str:
    mode = (site.path / "site.key").stat().st_mode & 0o777
    if mode & 0o077:
        raise InputError(f"site.key can be read by others (mode {mode:o}); chmod 600 {site.path / 'site.key'}")
    return "private key readable by its owner only"


def _build_config(site: Site) -> Config:
    """A config to look at data and model with; which task it is shows in the data."""
    from fedpeft.objectives.base import load_objective

    own, tree = site.settings, {}
    if own.model in registry.EMBEDDED:
        tree = {"model.task": registry.EMBEDDED[own.model]}
    elif own.data.columns or own.data.skip_bad:
        tree = {"model.task": next(task for task in registry.names("objectives") if load_objective(task).causal)}
    data = {f"data.{key}": value for key, value in asdict(own.data).items()}
    return configs.load({}, {"model.name": own.model, **tree, **data})


def _read_tasks(config: Config) -> Iterator[tuple[str, Records]]:
    """The records as each task reads them, of those that can.

    Raises:
        InputError: none can; what the first said.
    """
    from fedpeft.data import source

    failures, tasks = [], dict.fromkeys([config.model.task, *registry.names("objectives")])
    for task in tasks:
        try:
            records = source.whole(str(config.data.source), "data.source", config.data, task)
        except InputError as error:
            failures.append(str(error))
            continue
        yield task, records
    if len(failures) == len(tasks):
        raise InputError(failures[0])


def _check_data(site: Site, found: dict[str, Any]) -> str:
    if site.settings.data.source is None:
        raise InputError("site.data.source: no data are named.")
    _, records = next(_read_tasks(_build_config(site)))
    file = site.path / LABELS
    told = json.loads(file.read_text()) if file.exists() else {"run": "", "labels": records.label_names}
    if strange := sorted(set(records.label_names) - set(told["labels"])):
        raise InputError(
            shown(f"labels {', '.join(strange)} are none of run {told['run']}, which has {', '.join(told['labels'])}")
        )
    found["data"] = True
    return f"{len(records)} records, {records.kind}, labels: {', '.join(records.label_names[:10])}"


def load_model(site: Site) -> Base:
    """The site's base model, for the first task that it can be loaded for; a run says which it is.

    Raises:
        InputError: it can be loaded for none; what the first said.
    """
    from fedpeft.models import loading

    config, failures = _build_config(site).model, []
    for task in dict.fromkeys([config.task, *registry.names("objectives")]):
        try:
            with _quiet_loading():
                return loading.load(replace(config, task=task, max_length=1), 2, 0)
        except InputError as error:
            failures.append(str(error))
    raise InputError(failures[0])


def _check_model(site: Site, found: dict[str, Any]) -> str:
    import torch

    from fedpeft.run.world import find_device

    place, base = find_device(site.settings.device), load_model(site)
    torch.empty(1, device=place)
    found["positions"] = getattr(base.backbone.config, "max_position_embeddings", None)
    count = sum(value.numel() for value in base.backbone.parameters())
    return f"{site.settings.model}, {count:,} parameters, on {place}"


def _check_records(site: Site, found: dict[str, Any]) -> str:
    """Whether model, tokenizer or processor and records agree, in a task that the records are of."""
    from fedpeft.data.encode import encode
    from fedpeft.models import agreement, loading

    if not {"data", "positions"} <= found.keys():
        raise RunError("not checked: that takes data and a model")
    config = _build_config(site)
    failures: list[str] = []
    length = min(config.model.max_length, found["positions"] or config.model.max_length)
    for task, records in _read_tasks(config):
        try:
            with _quiet_loading():
                base = loading.load(replace(config.model, task=task, max_length=length), len(records.label_names), 0)
                encoded = encode(records, base.processor, task, length)
                agreement.require_records(base, encoded, "site.data.source")
        except InputError as error:
            failures.append(str(error))
            continue
        return f"the model takes them ({task}, tried with the longest)"
    raise InputError(failures[0])


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """A head of another size is no news here."""
    from transformers.utils import logging as notices

    told = notices.get_verbosity()
    notices.set_verbosity_error()
    try:
        yield
    finally:
        notices.set_verbosity(told)


def _check_server(site: Site, found: dict[str, Any]) -> str:
    from fedpeft.deploy.site import probe

    host, port = parse_endpoint(site.settings.server, "site.server")
    proxy = proxy_of(host)
    if proxy:
        way = f"through the proxy of {proxy}"
    else:
        way = ", ".join(filter(None, probe.tls_of(host, port, site.path / "ca.crt")))
    found["reached"] = True
    running = _is_running(site)
    if not running:
        try:
            probe.require_known(site)
        except RunError as error:
            raise RunError(f"{error} ({way}; no_proxy={host} goes past it)" if proxy else str(error)) from error
    return f"{site.settings.server}, {way}; {'the site is running' if running else 'its key is registered'}"


def _check_clock(site: Site, found: dict[str, Any]) -> str:
    from fedpeft.deploy.site import probe

    if "reached" not in found:
        raise RunError("not checked: the server was not reached")
    behind = probe.clock_behind_s(site)
    if behind > SKEW_S:
        raise RunError(f"{behind:.0f} s behind the coordinator's; keep it within {SKEW_S:g} s (NTP)")
    return f"{behind:.0f} s behind the coordinator's" if behind >= 1 else "within 1 s to 5 s of the coordinator's"
