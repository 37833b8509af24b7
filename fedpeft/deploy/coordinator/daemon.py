"""`fedpeft server start`: what sites reach, a process for every run at work, and what brings both back.

A run that has not ended has a process, which is started again from its last checkpoint when it ended before its time;
Flower itself has no such thing. Nothing of Flower is imported before all of them are on their way.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft import folders
from fedpeft.deploy import address, settings
from fedpeft.deploy.coordinator import server as commands
from fedpeft.deploy.processes import Child, end_children, launch_command
from fedpeft.deploy.settings import Server
from fedpeft.errors import InputError, RunError, Stopped
from fedpeft.files import explain_error, write_bytes

if TYPE_CHECKING:
    from fedpeft.deploy.coordinator.flower import Control

log = logging.getLogger("fedpeft")
POLL_S = 0.25
FULL_S = 10.0  # after the disk was full
DAY_S = 86_400.0
CHECK_S = 0.5  # between looks at sites and runs that were added, stopped or broken off
START_S = 60.0
MODES = ("tls", "insecure")  # how a child process is told
INSECURE = (
    "INSECURE: no TLS and no authentication. Anyone who reaches port %d can read every update and pose as a "
    "site. For tests on one machine only."
)


def serve(path: Path, insecure: bool = False) -> None:
    """Run until SIGTERM or Ctrl-C.

    Raises:
        InputError: the folder is in use, or a port is.
        RunError: the SuperLink does not come up.
    """
    server = settings.server(path)
    with _hold_lock(server, insecure):
        if insecure:
            log.warning(INSECURE, server.settings.port)
        else:
            commands.require_certificates(server)
        for host, port in ports(server):
            if address.answers(host, port):
                raise InputError(f"port {port} is in use. Change it in server.yaml; sites must know the Fleet port.")
        env = settings.environment(server.path)
        fleet = fleet_of(server, insecure, env)
        coordinator = Coordinator(server, insecure, env)
        try:
            with logged():
                coordinator.look_at_runs()  # what is to go on takes longest to load
            fleet.start()
            _wait_for(server, fleet)
            log.info(
                "coordinator ready: sites reach it at %s; %d sites added.",
                address.join(server.settings.host, server.settings.port),
                len(server.sites()),
            )
            looked = time.monotonic()
            while True:
                fleet.keep()
                with logged():
                    coordinator.step()
                if not insecure and time.monotonic() - looked > DAY_S:
                    looked = time.monotonic()
                    with logged():
                        commands.require_certificates(server)
                time.sleep(POLL_S)
        except Stopped:
            log.info("coordinator stops; runs go on when it is started again.")
        finally:
            end_children([fleet, *coordinator.children.values()])


def fleet_of(server: Server, insecure: bool, env: dict[str, str]) -> Child:
    """What sites talk to: the face, and the SuperLink behind it."""
    command = launch_command("fleet", server.path, MODES[insecure], *superlink_options(server, insecure))
    # Of gRPC nothing: it writes a line for every handshake that fails, and anybody can make those.
    quiet = {**env, "FLWR_LOG_LEVEL": "WARNING", "GRPC_VERBOSITY": "NONE"}
    return Child("fleet", command, quiet, server.path / "logs" / "fleet.log")


def superlink_options(server: Server, insecure: bool) -> list[str]:
    """The SuperLink's command line. It is on loopback with all of its APIs; sites reach the Fleet API by the face."""
    folder, options = server.path, {"host": "127.0.0.1", "port": server.settings.control_port}
    options |= {"database": server.database(insecure), "isolation": "process"}
    options |= {"superexec-auth-secret-file": folder / "secret"}
    if not insecure:
        names = {"ssl-ca-certfile": "ca.crt", "ssl-certfile": "server.crt", "ssl-keyfile": "server.key"}
        options |= {option: folder / name for option, name in names.items()}
    flags = ["--insecure" if insecure else "--enable-supernode-auth", "--disable-runtime-dependency-installation"]
    return [*flags, *(f"--{option}={value}" for option, value in options.items())]


@contextmanager
def logged() -> Iterator[None]:
    """What would end a command is a line in the log of a coordinator that goes on."""
    try:
        yield
    except (InputError, RunError) as error:
        log.error("%s", error)
    except OSError as error:
        log.error("%s", explain_error(error))


class Coordinator:
    """Lets sites in, and sees to it that each run that has not ended has its process."""

    def __init__(self, server: Server, insecure: bool, env: dict[str, str]) -> None:
        self.server, self.insecure, self.env = server, insecure, env
        self.children: dict[str, Child] = {}
        self.checked, self.full = -CHECK_S, -FULL_S
        self.sites: dict[str, str] = {}
        self.refusal = ""  # of a site, which has been said

    @cached_property
    def control(self) -> Control:
        """The SuperLink's Control API."""
        from fedpeft.deploy.coordinator.flower import Control

        return Control(self.server, self.insecure)

    def step(self) -> None:
        """Look at runs and sites if it is time. A SuperLink that does not answer is waited for, and so is room."""
        now = time.monotonic()
        if now - self.checked <= CHECK_S or now - self.full < FULL_S:
            return
        self.checked = now
        try:
            self.look_at_runs()
            self.register()
        except OSError as error:
            log.error("%s No run is started until then.", explain_error(error))
            self.full = now

    def register(self) -> None:
        """Let sites in that were added, and put out those that were removed."""
        import httpx

        if self.insecure or self.sites == self.server.sites():
            return
        try:
            self.control.register_missing()
        except httpx.HTTPStatusError as error:
            if str(error) != self.refusal:
                log.error("the SuperLink refuses a site; it is asked again and again: %s", error)
            self.refusal = str(error)
        except httpx.HTTPError as error:
            log.debug("the SuperLink does not answer: %s", error)
        else:
            self.sites, self.refusal = self.server.sites(), ""

    def look_at_runs(self) -> None:
        """Start the processes of new runs and of those that were broken off; end those of runs that have ended."""
        for folder in self.server.all_runs():
            name, ended = folder.name, commands.get_status(folder)["state"] in commands.ENDED
            if ended and name in self.children:
                end_children([self.children.pop(name)])
            elif not ended and name in self.children:
                self.children[name].keep()
            elif not ended:
                self.children[name] = self.begin(folder)

    def begin(self, folder: Path) -> Child:
        """The process of a run.

        Raises:
            OSError: there is no room for what it would write.
        """
        write_bytes(folder / "begun", f"{datetime.now(UTC).isoformat(timespec='seconds')}\n".encode())
        command = launch_command("run", self.server.path, folder.name, MODES[self.insecure])
        child = Child(f"run {folder.name}", command, self.env, folder / "log.txt")
        child.start()
        log.info("run %s: started.", folder.name)
        return child


@contextmanager
def _hold_lock(server: Server, insecure: bool) -> Iterator[None]:
    """Hold the folder's lock, and say in it that this process runs."""
    file = server.path / commands.RUNNING
    with folders.alone(server.path, file.name, patience_s=0.5):  # a command that only looks holds it for an instant
        file.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "insecure": insecure}))
        yield


def ports(server: Server) -> list[tuple[str, int]]:
    """Where this machine reaches the control port and those that sites reach."""
    chosen = server.settings
    public = [port for port in (chosen.port, chosen.http_port) if port is not None]
    return [("127.0.0.1", chosen.control_port), *((address.own_address(chosen.listen), port) for port in public)]


def _wait_for(server: Server, child: Child) -> None:
    """Wait until the ports answer; what was killed meanwhile is started again, what failed ends the start."""
    until = time.monotonic() + START_S
    for host, port in ports(server):
        while not address.answers(host, port):
            code = None if child.process is None else child.process.poll()
            if code is not None and code < 0:
                child.keep()
            elif code is not None or child.process is None or time.monotonic() > until:
                raise RunError(f"the {child.role} does not come up; see {child.output}.")
            time.sleep(0.2)
