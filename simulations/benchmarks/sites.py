"""`fedpeft bench sites`: rounds of a real coordinator with many light sites over gRPC and TLS on loopback.

Each site has its key and its connection; a few processes hold them all (`light_sites`), so that what is measured is
the coordinator: seconds a round, and the memory of its processes after each. With secure sums every site shares masks
with a group of others. Late sites answer after the deadline of every round.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from fedpeft import files
from fedpeft.deploy import keys
from fedpeft.deploy.coordinator import server as commands
from fedpeft.simulations.benchmarks.cells import Tell, silent
from fedpeft.simulations.benchmarks.deploy_overhead import free_port, running

PROCESSES = 4
NEIGHBOURS = 10  # of a site in secure sums
DEADLINE_S, LATE_BY_S = 60.0, 5.0
PATIENCE_S, LOOK_S = 900.0, 1.0  # for sites to connect
ROLES = ("run", "fleet")
Row = dict[str, Any]


def run(out: Path, sites: int, rounds: int, secagg: bool, late: int, tell: Tell = silent) -> Row:
    """Measure one run; writes results.json to `out`.

    Args:
        sites: of every round.
        late: every how many-th site answers after the deadline; 0 is none.

    Raises:
        RunError: the sites do not come up, or the run failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    coordinator = prepared(out, sites)
    config = out / "sites.yaml"
    config.write_text(json.dumps(config_of(sites, rounds, secagg, late)))
    cli = [sys.executable, "-m", "fedpeft.cli.main", "server", "start", str(coordinator)]
    step = -(-sites // PROCESSES)
    late_s = DEADLINE_S + LATE_BY_S
    light = [sys.executable, "-m", "fedpeft.simulations.benchmarks.light_sites", str(out)]
    starts = {"coordinator": cli}
    starts |= {
        f"sites-{first}": [*light, str(first), str(min(first + step, sites)), str(late), str(late_s)]
        for first in range(0, sites, step)
    }
    with running(out, starts):
        tell("the sites connect ...")
        commands.await_sites(coordinator, sites, PATIENCE_S, LOOK_S)
        name = commands.run(coordinator, str(config), [])["run"]
        rows = watched(coordinator, name, tell)
    result = {
        "reproduce": f"fedpeft bench sites --out DIR --sites {sites} --rounds {rounds}"
        + (" --secagg" if secagg else "")
        + (f" --late {late}" if late else ""),
        "sites": sites,
        "secagg": secagg,
        "late": late,
        "median_s": statistics.median(row["seconds"] for row in rows[1:] or rows),
        "rows": rows,
    }
    files.write_bytes(out / "results.json", (json.dumps(result, indent=1) + "\n").encode())
    return result


def prepared(out: Path, sites: int) -> Path:
    """A coordinator's folder that knows so many sites, whose keys are below `out`."""
    coordinator = out / "coordinator"
    commands.init(coordinator, "localhost", free_port(), free_port(), "127.0.0.1")
    for index in range(sites):
        name = f"site-{index:04d}"
        line = keys.site_keys(out / "keys" / name)
        (coordinator / "sites" / f"{name}.pub").write_text(f"{line}\n")
    return coordinator


def config_of(sites: int, rounds: int, secagg: bool, late: int) -> Row:
    """A run with a small adapter."""
    return {
        "model": {"name": "tiny-bert", "task": "sequence-classification"},
        "adapter": {"name": "lora", "r": 4},
        "data": {"labels": ["no", "yes"], "clients": sites},
        "strategy": {"name": "fedit", "weighting": "uniform"},
        "secagg": {"enabled": secagg, "neighbours": min(NEIGHBOURS, (sites - 1) // 2 * 2), "bits": 18}
        if secagg
        else {},
        "run": {"rounds": rounds, "deadline_s": DEADLINE_S if late else None, "quorum": 0.5},
    }


def watched(coordinator: Path, name: str, tell: Tell) -> list[Row]:
    """The rounds of a run: seconds, sites that answered and were late, CPU seconds of the coordinator's processes and
    MB of each, and the machine's load.
    """
    rows: list[Row] = []
    begun, spent_s = time.monotonic(), 0.0

    def heard(event: Row) -> None:
        nonlocal begun, spent_s
        if event["event"] == "round":
            used = {role: used_by(coordinator, role) for role in ROLES}
            memory = {f"{role}_mb": mb for role, (mb, _) in used.items()}
            cpu_s = sum(seconds for _, seconds in used.values())
            wall, begun = time.monotonic() - begun, time.monotonic()
            rows.append(
                {
                    "round": event["round"],
                    "seconds": event["seconds"],
                    "wall_s": round(wall, 2),
                    "answered": len(event["clients"]),
                    "left_out": len(event.get("quarantined", {})),
                    "cpu_s": round(cpu_s - spent_s, 2),
                    "load": round(os.getloadavg()[0], 1),
                    **memory,
                }
            )
            spent_s = cpu_s
            tell(", ".join(f"{key} {value}" for key, value in rows[-1].items()))

    commands.wait(coordinator, name, heard)
    return rows


def used_by(coordinator: Path, role: str) -> tuple[float, float]:
    """MB of memory of a coordinator's process that no file has, and its CPU seconds; 0 where there is none or no /proc.

    Pages of mapped files, as of answers that are added up, are the system's to take back.
    """
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().decode().split("\0")
            if "fedpeft.deploy.launch" in words and role in words and str(coordinator) in words:
                line = next(line for line in (place / "status").read_text().splitlines() if line.startswith("RssAnon"))
                user, system = (place / "stat").read_text().rpartition(")")[2].split()[11:13]
                return round(int(line.split()[1]) / 1000, 1), (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
        except (OSError, StopIteration):
            continue
    return 0.0, 0.0


def show(result: Row) -> None:
    """Print the rows."""
    from rich.table import Table

    from fedpeft.cli.console import out

    table = Table(title=f"{result['sites']} light sites{', secure sums' if result['secagg'] else ''}")
    columns = ("round", "seconds", "cpu_s", "load", "answered", "left_out", *(f"{role}_mb" for role in ROLES))
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in result["rows"]:
        table.add_row(*(str(row[column]) for column in columns))
    out.print(table)
    out.print(f"REPRODUCE: {result['reproduce']}", soft_wrap=True)
