"""`fedpeft server start`: the SuperLink, a process for every run at work, and what brings both back.

This process takes Flower's place as the executor of runs: what the SuperLink hands out is a run's name, and what is
started for it is the installed fedpeft. A run whose process or SuperLink ended is started again from its last
checkpoint; Flower itself has no such thing.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from fedpeft import folders
from fedpeft.deploy import address, settings
from fedpeft.deploy.coordinator import server as commands
from fedpeft.deploy.coordinator.control import Control
from fedpeft.deploy.coordinator.flower import HeldTask, executor_client, take_task
from fedpeft.deploy.processes import LONGEST_PAUSE_S, STEADY_S, Child, end_children, launch_command
from fedpeft.deploy.settings import Server
from fedpeft.errors import InputError, RunError, Stopped
from fedpeft.files import explain_error, write_bytes

log = logging.getLogger("fedpeft")
POLL_S = 0.25
TELL_S = 10.0  # between words to Flower that its runs are worked on
FULL_S = 10.0  # after the disk was full
DAY_S = 86_400.0
CHECK_S = 1.0  # between looks at sites and runs that were added, stopped or broken off
START_S = 60.0
BEFORE = ("pending", "starting")
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
        for place in ports(server):
            require_free(*place)
        env = settings.environment(server.path)
        fleet = fleet_of(server, insecure, env)
        coordinator = Coordinator(server, insecure, env)
        try:
            for child in fleet:
                child.start()
            _wait_for(server, fleet)
            log.info(
                "coordinator ready: sites reach it at %s; %d sites added.",
                address.join(server.settings.host, server.settings.port),
                len(server.sites()),
            )
            looked = time.monotonic()
            while True:
                for child in fleet:
                    child.keep()
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
            end_children([*fleet, *coordinator.children.values()])


def fleet_of(server: Server, insecure: bool, env: dict[str, str]) -> list[Child]:
    """What sites talk to: the SuperLink, and the face before it. Each may end and come back without the other."""
    commands = {
        "superlink": launch_command("superlink", server.path, *superlink_options(server, insecure)),
        "face": launch_command("face", server.path, mode(insecure)),
    }
    # Of gRPC nothing: it writes a line for every handshake that fails, and anybody can make those.
    quiet = {**env, "FLWR_LOG_LEVEL": "WARNING", "GRPC_VERBOSITY": "NONE"}
    return [Child(role, command, quiet, server.path / "logs" / f"{role}.log") for role, command in commands.items()]


def superlink_options(server: Server, insecure: bool) -> list[str]:
    """The SuperLink's command line. It is on loopback with all of its APIs; sites reach the Fleet API by the face."""
    chosen, folder = server.settings, server.path
    tls = (
        ["--insecure"]
        if insecure
        else [
            "--ssl-ca-certfile",
            str(folder / "ca.crt"),
            "--ssl-certfile",
            str(folder / "server.crt"),
            "--ssl-keyfile",
            str(folder / "server.key"),
            "--enable-supernode-auth",
        ]
    )
    return [
        "--host",
        "127.0.0.1",
        "--port",
        str(chosen.control_port),
        *tls,
        "--database",
        str(server.database(insecure)),
        "--isolation",
        "process",
        "--superexec-auth-secret-file",
        str(folder / "secret"),
        "--disable-runtime-dependency-installation",
    ]


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
    """Hands runs to processes, and brings back those that ended before their time."""

    def __init__(self, server: Server, insecure: bool, env: dict[str, str]) -> None:
        self.server, self.insecure, self.env = server, insecure, env
        self.children: dict[str, Child] = {}
        self.held: dict[str, HeldTask] = {}
        self.told = -TELL_S
        self.control = Control(server, insecure)
        self.root = None if insecure else (server.path / "ca.crt").read_bytes()
        self.runtime = executor_client(server.control, self.root, (server.path / "secret").read_bytes())
        self.checked = -CHECK_S
        self.sites: dict[str, str] = {}
        self.refusal = ""  # of a site, which has been said
        self.submitted: set[str] = set()
        self.pauses_s: dict[str, float] = {}
        self.full = -FULL_S

    def step(self) -> None:
        """Look once for work. A SuperLink that does not answer is waited for, and so is room on the disk."""
        self.tell()  # first, whatever hinders the rest: a run at work must not be given up
        if time.monotonic() - self.full < FULL_S:
            return
        try:
            if time.monotonic() - self.checked > CHECK_S:
                self.checked = time.monotonic()
                self.register()
                self.look_at_runs()
            self.take()
        except httpx.HTTPStatusError as error:
            log.error("the SuperLink refuses: %s", error)
        except httpx.HTTPError as error:
            log.debug("the SuperLink does not answer: %s", error)
        except OSError as error:
            log.error("%s No run is started until then.", explain_error(error))
            self.full = time.monotonic()

    def register(self) -> None:
        """Let sites in that were added, and put out those that were removed. What is refused holds up no run."""
        if self.insecure or self.sites == self.server.sites():
            return
        try:
            self.control.register_missing()
        except httpx.HTTPStatusError as error:
            if str(error) != self.refusal:
                log.error("the SuperLink refuses a site; it is asked again and again: %s", error)
            self.refusal = str(error)
        else:
            self.sites, self.refusal = self.server.sites(), ""

    def take(self) -> None:
        """Start the process of a run that Flower has ready."""
        task = take_task(self.runtime)
        if task is None:
            return
        number, token = task
        name = self.named(number)
        if name is None:  # submitted by somebody else on this machine; its code is not run
            log.warning("run %d is none of this coordinator's and is ignored.", number)
            self.control.stop_run(number)
            return
        folder = self.server.runs / name
        env = {**self.env, "FEDPEFT_TASK_TOKEN": token}  # not in the arguments, which every user can read
        child = Child(
            f"run {name}",
            launch_command("run", self.server.path, name, mode(self.insecure)),
            env,
            folder / "log.txt",
        )
        child.start()  # if it cannot be started nothing is held, and Flower offers the run again
        self.children[name] = child
        # By this process, not by the run's: on a busy machine that one loads longer than Flower waits for it.
        self.held[name] = HeldTask(self.server.control, self.root, token)
        self.held[name].beat()
        log.info("run %s: started.", name)

    def look_at_runs(self) -> None:
        """Submit new runs and those that nobody works on any more; after a start that is all that have not ended."""
        for folder in self.server.all_runs():
            name, number = folder.name, self.server.flower_number(folder)
            child = self.children.get(name)
            alive = child is not None and child.process is not None and child.process.poll() is None
            if commands.get_status(folder)["state"] in commands.ENDED:
                if child is not None:
                    self.drop(name)
                    self.control.stop_run(number)
                continue
            if alive or (child is None and name in self.submitted and self.control.run_status(number) in BEFORE):
                continue
            if child is not None and not self.rested(name, child):
                continue
            if number:
                log.warning("run %s: goes on from its last checkpoint.", name)
                self.control.stop_run(number)
            self.drop(name)
            self.submit(folder)

    def rested(self, name: str, child: Child) -> bool:
        """Whether a run whose process ended may be started again: after a longer pause each time."""
        lasted = time.monotonic() - child.begun
        pause_s = 0.0 if lasted > STEADY_S else self.pauses_s.get(name, 0.0)
        if lasted < pause_s:
            return False
        self.pauses_s[name] = min(LONGEST_PAUSE_S, 2 * pause_s or 1.0)
        return True

    def submit(self, folder: Path) -> None:
        """Have Flower start a run, and note its number, without which the run would be taken for somebody else's.

        Another number each time: Flower cannot start a run again, so it gets a new one of the same name.
        """
        number = self.control.start_run(folder.name)
        try:
            write_bytes(folder / "flower.json", json.dumps({"run_id": number}).encode())
        except OSError:
            self.control.stop_run(number)
            raise
        self.submitted.add(folder.name)

    def tell(self) -> None:
        """Tell Flower, now and then, of every run at work; one that it has given up is begun again, in place of its
        process.
        """
        if time.monotonic() - self.told <= TELL_S:
            return
        self.told = time.monotonic()
        for name in list(self.held):
            ended = commands.get_status(self.server.runs / name)["state"] in commands.ENDED
            try:
                if not ended and not self.held[name].beat():
                    log.warning("run %s: the SuperLink has given it up.", name)
                    self.drop(name)
            except httpx.HTTPError as error:
                log.debug("the SuperLink does not answer: %s", error)

    def drop(self, name: str) -> None:
        """End a run's process if there is one, and tell Flower no longer that it is worked on."""
        if name in self.children:
            end_children([self.children.pop(name)])
            self.held.pop(name).close()

    def named(self, number: int) -> str | None:
        """The run that was last submitted under Flower's number."""
        return next(
            (folder.name for folder in self.server.all_runs() if self.server.flower_number(folder) == number), None
        )


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


def require_free(host: str, port: int) -> None:
    """Raise InputError if something listens on a port of this machine."""
    if address.answers(host, port):
        raise InputError(f"port {port} is in use. Change it in server.yaml; sites must know the Fleet port.")


def mode(insecure: bool) -> str:
    """How a child process is told whether there is TLS."""
    return "insecure" if insecure else "tls"


def _wait_for(server: Server, children: list[Child]) -> None:
    until = time.monotonic() + START_S
    for host, port in ports(server):
        while not address.answers(host, port):
            for child in children:
                if child.process is None or child.process.poll() is not None or time.monotonic() > until:
                    raise RunError(f"the {child.role} does not come up; see {child.output}.")
            time.sleep(0.2)
