"""A coordinator and sites as real processes on loopback, driven by the command line only."""

from __future__ import annotations

import contextlib
import copy
import csv
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from fedpeft import config as configs
from fedpeft.adapters import folder
from fedpeft.data import source, split
from fedpeft.privacy.ledger import Ledger
from fedpeft.simulations.run import simulate

FEDPEFT = [sys.executable, "-m", "fedpeft.cli.main"]
WORDS = {"no": ["bad", "sad", "mad"], "yes": ["fun", "joy", "win"]}
LABELS = list(WORDS)
TRAIN = {
    "model": {"name": "tiny-bert", "task": "sequence-classification"},
    "adapter": {"name": "lora", "r": 2, "alpha": 4},
    "data": {"labels": LABELS},
    "strategy": {"name": "fedsvd", "weighting": "uniform"},
    "client": {"optimizer": "sgd", "lr": 0.25, "local_steps": 2, "local_epochs": None, "batch_size": 16},
    "privacy": {"unit": "sample", "epsilon": 8.0, "delta": 1e-3},
    "run": {"rounds": 3, "seed": 1},
}
POLICY = "unit: sample\nmax_delta: 0.01\nseeded_noise: true\nunbounded: [max_epsilon, max_rounds, records]\n"
STEADY = ("privacy.randomness=seeded", "run.quorum=1.0", "run.deadline_s=600")  # of a run that can be repeated
NAMES = [split.client_name(index) for index in range(3)]
COUNTS = dict(zip(NAMES, (60, 50, 40), strict=True))


def write_records(path, count, seed, words=WORDS):
    """`count` short texts of classes with words of their own; the rows."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        label = rng.choice(list(words))
        rows.append([" ".join(rng.choice([*words[label], "the", "cat", "dog"]) for _ in range(6)), label])
    write_rows(path, rows)
    return rows


def write_rows(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *rows])


def simulated(deployment, tree, overrides, name):
    """The same training as a simulation: its run folder. One file with all records, split as over the sites.

    One client after another: in a cohort clients share dropout's generator, which real sites cannot.
    """
    root, tree = deployment.root, copy.deepcopy(tree)
    write_rows(root / "all.csv", [row for rows in deployment.rows.values() for row in rows])
    tree["data"] |= {"source": str(root / "all.csv"), "clients": len(NAMES)}
    config = configs.load(tree, overrides)
    train, _ = source.load(config.data, config.model.task, config.run.seed)
    parts, first = {}, 0
    for client in NAMES:
        parts[client] = list(range(first, first + COUNTS[client]))
        first += COUNTS[client]
    split.save(root / "split.json", parts, train, config)
    alone = {"data.split": str(root / "split.json"), "run.baselines": False, "run.cohort_tokens": 0}
    simulate(tree, {**overrides, **alone}, root / name)
    return root / name


@contextlib.contextmanager
def three_sites(root, policy=POLICY, words=WORDS):
    """A coordinator and three sites, running; `rows` are each site's records, test.csv is the coordinator's."""
    made = Deployment(root)
    made.rows = {
        name: write_records(root / f"{name}.csv", COUNTS[name], seed, words) for seed, name in enumerate(NAMES)
    }
    write_records(root / "test.csv", 60, 99, words)
    try:
        for name in NAMES:
            made.add_site(name, root / f"{name}.csv", policy=policy)
        made.over_http(NAMES[1])
        made.start("coordinator")
        for name in NAMES:
            made.start(name)
        made.ready()
        yield made
    finally:
        made.close()


def start_sites(made, names, over_http=(), through=None):
    """A coordinator and sites with 30 records each, at work.

    Args:
        over_http: those that call over HTTP.
        through: ports of the coordinator, and those by which sites reach them.
    """
    made.start("coordinator")
    for seed, name in enumerate(names):
        write_records(made.root / f"{name}.csv", 30, seed)
        made.add_site(name, made.root / f"{name}.csv")
        if name in over_http:
            made.over_http(name)
        file = made.root / name / "site.yaml"
        for port, other in (through or {}).items():
            file.write_text(file.read_text().replace(f":{port}", f":{other}"))
    made.ready()
    for name in names:
        made.start(name)


def read_results(made, run, names):
    """The adapter's bits, the numbers of the rounds, and what each site has spent: each round once."""
    tensors = folder.load(made.coordinator / "runs" / run / "adapter").tensors
    spent = {}
    for name in names:
        entries = [one for one in Ledger(made.root / name / "ledger" / f"{name}.jsonl").entries() if one.run == run]
        spent[name] = [(entry.round, entry.release) for entry in entries]
    bits = {key: value.numpy().tobytes() for key, value in tensors.items()}
    return bits, [event["round"] for event in made.rounds(run)], spent


def free_ports(count):
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def until(condition, what, seconds=60.0):
    """What the condition gives once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds:g} s: {what}")


class Deployment:
    """Everything below one folder; `close` leaves no process behind."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.port, self.control_port, self.http_port = free_ports(3)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.begun: dict[str, int] = {}
        self.coordinator = root / "coordinator"
        self.call(
            "server",
            "init",
            self.coordinator,
            "--host",
            "localhost",
            "--port",
            self.port,
            "--control-port",
            self.control_port,
            "--listen",
            "127.0.0.1",
            "--http-port",
            self.http_port,
        )

    def call(self, *arguments, code=0):
        """Run one command with --json; what it printed."""
        done = subprocess.run(
            [*FEDPEFT, *map(str, arguments), "--json"], capture_output=True, text=True, timeout=240, cwd=self.root
        )
        assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return json.loads(done.stdout) if done.stdout.strip() else done.stderr

    def add_site(self, name, data, register=True, policy=POLICY):
        folder = self.root / name
        made = self.call(
            "site",
            "init",
            folder,
            "--name",
            name,
            "--server",
            f"localhost:{self.port}",
            "--ca",
            self.coordinator / "ca.crt",
            "--data",
            data,
            "--model",
            "tiny-bert",
        )
        (folder / "policy.yaml").write_text(policy)
        if register:
            self.call("server", "add-site", self.coordinator, name, made["public_key"])
        return folder

    def over_http(self, name):
        """Have a site call by HTTP, as one behind a web proxy."""
        file = self.root / name / "site.yaml"
        kept = [line for line in file.read_text().splitlines() if not line.startswith(("server:", "transport:"))]
        file.write_text("\n".join([*kept, f"server: localhost:{self.http_port}", "transport: http"]) + "\n")

    def start(self, what, *options):
        """Start the coordinator, or a site by name."""
        kind, folder = ("server", self.coordinator) if what == "coordinator" else ("site", self.root / what)
        log = (self.root / f"{what}.log").open("ab")
        self.begun[what] = log.tell()  # a log goes on over restarts: what an earlier process said is not this one's
        command = [*FEDPEFT, kind, "start", str(folder), *options]
        self.processes[what] = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.root, start_new_session=True)
        log.close()

    def log(self, what, begun=0):
        """What was said on the terminal, from a byte on."""
        return (self.root / f"{what}.log").read_bytes()[begun:].decode(errors="replace")

    def ready(self):
        until(lambda: "coordinator ready" in self.log("coordinator", self.begun["coordinator"]), "the coordinator", 120)

    def pids(self, what, role):
        """Process ids of a role below the coordinator or a site."""
        return [pid for pid, line in children(self.processes[what].pid) if f"fedpeft.deploy.launch {role} " in line]

    def kill(self, what, role):
        (pid,) = self.pids(what, role)
        os.kill(pid, signal.SIGKILL)

    def kill_all(self, what):
        """SIGKILL to the parent alone: its children have to notice."""
        parent = self.processes.pop(what)
        below = [pid for pid, _ in children(parent.pid)]
        parent.kill()
        parent.wait()
        until(lambda: not [pid for pid in below if alive(pid)], "children that end with their parent", 20)

    def stop(self, what):
        process = self.processes.pop(what)
        process.terminate()
        assert process.wait(20) == 0

    def submit(self, config, *overrides):
        path = self.root / "train.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        return self.call("server", "run", self.coordinator, path, "--detach", *overrides)["run"]

    def status(self, run):
        return self.call("server", "status", self.coordinator, run)["runs"][0]

    def events(self, run):
        file = self.coordinator / "runs" / run / "metrics.jsonl"
        text = file.read_text() if file.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def rounds(self, run):
        return [event for event in self.events(run) if event["event"] == "round"]

    def state(self, run):
        return json.loads((self.coordinator / "runs" / run / "status.json").read_text())["state"]

    def wait(self, run, seconds=120.0):
        try:
            until(lambda: self.state(run) in ("done", "failed"), run, seconds)
            assert self.state(run) == "done"
        except AssertionError:
            print((self.coordinator / "runs" / run / "log.txt").read_text())
            print(self.log("coordinator"))
            raise

    def close(self):
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def children(parent):
    """(pid, command line) of all descendants of a process."""
    found, stack = [], [parent]
    while stack:
        pid = stack.pop()
        try:
            below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            continue
        for child in map(int, below):
            stack.append(child)
            try:
                line = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            found.append((child, line))
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def listening(pids):
    """Port -> address (hexadecimal, as the kernel has it) of every TCP socket that these processes listen on."""
    own = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                own.add(os.readlink(entry))
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            address, port = fields[1].split(":")
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                found[int(port, 16)] = address
    return found
