"""The two folders of a deployment: the coordinator's with server.yaml, a site's with site.yaml, and what lies in them.

coordinator: server.yaml ca.crt ca.key server.crt server.key secret sites/<name>.pub state.db runs/<run>/ logs/
site:        site.yaml policy.yaml ca.crt site.key site.pub status.json owed/ ledger/<name>.jsonl state/<run>/<name>/
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpeft import config as configs
from fedpeft import foreign
from fedpeft.config.option import option
from fedpeft.deploy.address import join, parse_endpoint, parse_host, parse_listen
from fedpeft.deploy.keys import pem
from fedpeft.errors import InputError

log = logging.getLogger("fedpeft")
NAME = foreign.NAME
LAST = "last"  # stands for a run; names of runs end in the time of their start
QUIET = {  # Flower reports, asks for updates and installs packages unless told not to
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


@dataclass
class ServerSettings:
    """server.yaml."""

    host: str = option("localhost", "name or address by which sites reach the coordinator; it is in the certificate")
    port: int = option(9092, "Fleet port (gRPC), the only one that sites need", low=1, high=65535)
    http_port: int | None = option(
        None, "port for the Fleet API over HTTPS: sites behind a web proxy, Flower's own nodes", low=1, high=65535
    )
    listen: str = option("0.0.0.0", "address that the ports for sites are bound to")
    control_port: int = option(9093, "port of the control and runtime APIs, on 127.0.0.1 only", low=1, high=65535)


@dataclass
class SiteData:
    """What a site trains on. No server can change it."""

    source: str | None = option(None, "file, folder or prepared data set with this site's records", path=True)
    text: str | None = option(None, "text column; found by name when null")
    image: str | None = option(None, "image column; found by name when null")
    label: str | None = option(None, "label column; found by name when null")
    label_separator: str | None = option(None, "what stands between several labels, or numbers, of a record in a text")
    columns: dict[str, Any] = option({}, "columns of conversations by what is in them, as data.columns of a run")
    skip_bad: bool = option(False, "leave out records that are no conversation, and count them")
    format: dict[str, Any] = option({}, "delimiter and encoding of a csv or tsv file, as data.format of a run")


@dataclass
class SiteSettings:
    """site.yaml."""

    name: str = option("", "the name that the coordinator has registered this site under")
    server: str = option("localhost:9092", "HOST:PORT of the coordinator")
    transport: str = option("grpc", "how the site calls: grpc, or http through a web proxy", choices=("grpc", "http"))
    model: str = option(
        "tiny-vit", "embedded or prepared model, or a local folder, whatever the server's config names", path=True
    )
    device: str = option("auto", "torch device; auto takes an accelerator when there is one")
    threads: int = option(1, "threads of the worker", low=1)
    data: SiteData = field(default_factory=SiteData)


@dataclass(frozen=True)
class Server:
    """A coordinator's folder."""

    path: Path
    settings: ServerSettings

    @property
    def runs(self) -> Path:
        """The folder with one folder for each submitted run."""
        return self.path / "runs"

    @property
    def control(self) -> str:
        """HOST:PORT of the SuperLink's control API; it listens on loopback only."""
        return f"127.0.0.1:{self.settings.control_port}"

    def database(self, insecure: bool) -> Path:
        """Where Flower keeps runs, nodes and messages."""
        return self.path / ("insecure.db" if insecure else "state.db")

    def run(self, name: str) -> Path:
        """The folder of a run; `last` is the one that was submitted last.

        Raises:
            InputError: there is no such run.
        """
        if name == LAST and (runs := self.all_runs()):
            return runs[-1]
        if not NAME.fullmatch(name) or not (self.runs / name).is_dir():
            known = [path.name for path in self.all_runs()]
            raise InputError(f"RUN: no run '{name}' in {self.runs}. Runs: {', '.join(known) or 'none'}.")
        return self.runs / name

    def all_runs(self) -> list[Path]:
        """Folders of all runs, in the order in which they were submitted."""
        found = [path for path in self.runs.glob("*") if NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: (path / "resolved.yaml").stat().st_mtime)

    def run_with(self, number: int) -> Path | None:
        """The folder of the run with this number."""
        return next((folder for folder in self.all_runs() if number_of(folder.name) == number), None)

    def site_keys(self) -> dict[str, bytes]:
        """Name -> public key, in PEM, of every site; a file that is no key, or another site's, is said, and lets nobody
        in.
        """
        found: dict[str, bytes] = {}
        for name, line in self.sites().items():
            path = self.path / "sites" / f"{name}.pub"
            try:
                key = pem(line)
            except InputError as error:
                log.error("%s: %s", path, error)
                continue
            if other := next((known for known, value in found.items() if value == key), None):
                log.error("%s: the key of %s, which has it already. Every site has a key of its own.", path, other)
            else:
                found[name] = key
        return found

    def sites(self) -> dict[str, str]:
        """Name -> public key of every site that was added."""
        return {path.stem: path.read_text().strip() for path in sorted((self.path / "sites").glob("*.pub"))}


@dataclass(frozen=True)
class Site:
    """A site's folder."""

    path: Path
    settings: SiteSettings

    @property
    def policy(self) -> Path:
        """The file that says what this site allows, whatever the coordinator's config asks for."""
        return self.path / "policy.yaml"


def server(path: Path) -> Server:
    """Read a coordinator's folder."""
    found = _read_settings(path, "server.yaml", ServerSettings, "server")
    found.host, found.listen = parse_host(found.host, "server.host"), parse_listen(found.listen, "server.listen")
    return Server(path.absolute(), found)


def site(path: Path) -> Site:
    """Read a site's folder."""
    settings = _read_settings(path, "site.yaml", SiteSettings, "site")
    require_name(settings.name, "site.name")
    settings.server = join(*parse_endpoint(settings.server, "site.server"))
    return Site(path.absolute(), settings)


def make_absolute(name: str | None) -> Any:
    """The absolute path where a name, of a model or data set, is that of a file or folder here."""
    return str(Path(name).absolute()) if name and Path(name).exists() else name


def number_of(run: str) -> int:
    """The number that a run's messages carry, 64 bits as Flower's have; the same whenever its process begins anew."""
    return int.from_bytes(hashlib.sha256(run.encode()).digest()[:8], "big")


def require_name(name: str, key: str) -> None:
    """Refuse a name that could not be a file name on every system."""
    if not NAME.fullmatch(name):
        raise InputError(
            f"{key}: '{name}' is not a name: up to 63 letters, digits, dots, hyphens and underscores, the "
            "first a letter or digit."
        )


def environment(folder: Path) -> dict[str, str]:
    """For Flower's processes: nothing is reported, looked up or installed, or kept outside of the folder."""
    known = dict.fromkeys(os.environ.get(name) for name in ("no_proxy", "NO_PROXY"))
    direct = ",".join([*filter(None, known), "127.0.0.1", "localhost"])
    return {**os.environ, **QUIET, "FLWR_HOME": str(folder / ".flwr"), "NO_PROXY": direct, "no_proxy": direct}


def _read_settings(path: Path, name: str, cls: Any, key: str) -> Any:
    if not (path / name).is_file():
        raise InputError(f"{path}: no {name}. Make the folder with `fedpeft {key} init {path}`.")
    return configs.build(cls, configs.read_yaml(path / name), key)
