"""`fedpeft bench server`: what aggregation costs on the server for an adapter shaped like that of a 7B model.

The shipped strategies work in factors; most public code forms dense m x n matrices. Both are timed here, each in a
process of its own so that its peak memory is its own. Sites go one after another: the factors of one site are drawn
(not timed), aggregated (timed) and dropped, so memory is that of one site. The dense way is measured on few sites and
multiplied by the number of sites; outputs say so. Before anything is timed, each method's result is compared with its
dense definition on a small case; afterwards one site runs under a watch on the size of every tensor made.

Factors are float32; strategies compute in float64, the dense way in float32, as public code does.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedpeft import __version__, files, registry, seeds
from fedpeft.errors import InputError, RunError
from fedpeft.simulations.benchmarks.cells import Progress, Tell, silent
from fedpeft.state import AdaptedLayer, AdapterState, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy

if TYPE_CHECKING:
    from rich.table import Table

SITE = "layer"
OPTIONS: dict[str, dict[str, Any]] = {
    "fedit": {},
    "fedsvd": {},
    "lora_fair": {"lambda_": 0.01},
    "flexlora": {},
    "fedex": {},
}
DENSE = ("fedsvd", "lora_fair", "flexlora", "fedex")  # FedIT never forms a product


@dataclass(frozen=True)
class Size:
    """Adapted layers of shape [m, n], LoRA rank r, clients that answer."""

    sites: int
    m: int
    n: int
    r: int
    clients: int


class Largest(TorchDispatchMode):
    """Watches every tensor that an operation returns: `numel` is the size of the largest."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation for it
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def make(name: str) -> FederatedStrategy:
    """The registered strategy with the options that are measured here."""
    strategy: FederatedStrategy = registry.load("strategies", name)(**OPTIONS[name])
    return strategy


def draw(
    strategy: FederatedStrategy, size: Size, number: int, dtype: torch.dtype = torch.float32
) -> tuple[ServerState, list[Update]]:
    """The server's state and the clients' uploads for one site: drifted copies of its factors, weights 1 to K."""
    generator = seeds.torch_generator(0, "bench", "server", number)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    A, B = normal(size.r, size.n) / size.n**0.5, normal(size.m, size.r) / size.r**0.5
    start = AdapterState({f"{SITE}/A": A, f"{SITE}/B": B}, {SITE: AdaptedLayer("lora", (size.m, size.n))})
    server = strategy.initial(start, 0)
    updates = []
    for client in range(size.clients):
        drifted = {
            f"{SITE}/A": A + 0.3 * normal(size.r, size.n) / size.n**0.5,
            f"{SITE}/B": B + 0.3 * normal(size.m, size.r) / size.r**0.5,
        }
        uploads = AdapterState(drifted, start.sites).select(strategy.uploads(server))
        updates.append(Update(f"client-{client:03d}", client + 1.0, uploads))
    return server, updates


def aggregate(strategy: FederatedStrategy, server: ServerState, updates: list[Update]) -> AdapterState:
    """All the work between the clients' uploads and the next broadcast."""
    adapter: AdapterState = strategy.before_round(strategy.aggregate(server, updates)).adapter
    return adapter


def dense(name: str, server: ServerState, updates: list[Update]) -> Tensor:
    """The method's change of the weight (s = 1) by its definition in dense [m, n] matrices, in the uploads' dtype."""
    p = [update.weight / sum(update.weight for update in updates) for update in updates]
    Bs = [update.adapter[f"{SITE}/B"] for update in updates]
    B = sum((weight * value for weight, value in zip(p, Bs, strict=True)), torch.zeros_like(Bs[0]))
    r = B.shape[1]
    if name == "fedsvd":
        return _rank(B @ server.adapter[f"{SITE}/A"], r)
    As = [update.adapter[f"{SITE}/A"] for update in updates]
    A = sum((weight * value for weight, value in zip(p, As, strict=True)), torch.zeros_like(As[0]))
    if name == "fedit":
        return B @ A
    exact = torch.zeros(B.shape[0], A.shape[1], dtype=B.dtype)
    for weight, left, right in zip(p, Bs, As, strict=True):
        exact += weight * (left @ right)
    if name == "flexlora":
        return _rank(exact, r)
    residual = exact - B @ A
    if name == "fedex":
        return B @ A + residual
    gram = A @ A.T
    ridge = OPTIONS[name]["lambda_"] * gram.trace() / r * torch.eye(r, dtype=A.dtype)
    corrected: Tensor = (B + residual @ A.T @ torch.linalg.inv(gram + ridge)) @ A
    return corrected


def _rank(matrix: Tensor, r: int) -> Tensor:
    U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    best: Tensor = (U[:, :r] * S[:r]) @ Vt[:r]
    return best


def check(name: str) -> float:
    """Relative distance to the dense definition on a small case in float64.

    Raises:
        RunError: it is above rounding.
    """
    strategy = make(name)
    server, updates = draw(strategy, Size(1, 48, 40, 4, 5), 0, torch.float64)
    state = aggregate(strategy, server, updates)
    product = state[f"{SITE}/B"] @ state[f"{SITE}/A"]
    if f"{SITE}/residual_B" in state:
        product = product + state[f"{SITE}/residual_B"] @ state[f"{SITE}/residual_A"]
    reference = dense(name, server, updates)
    distance = float((product - reference).norm() / reference.norm())
    if not distance < 1e-9:
        raise RunError(f"bench server: {name} is {distance:.1e} away from its dense definition; nothing was timed.")
    return distance


def largest(name: str, size: Size) -> int:
    """Entries of the largest tensor that the strategy makes for one site."""
    strategy, watch = make(name), Largest()
    server, updates = draw(strategy, size, 0)
    with watch:
        aggregate(strategy, server, updates)
    return watch.numel


def measure(name: str, size: Size, way: str) -> dict[str, Any]:
    """Time and memory of one method in this process; `way` is "factors" or "dense"."""
    strategy = make(name)
    result: dict[str, Any] = {"check": check(name)}
    before, seconds = resident("VmRSS"), 0.0
    for number in range(size.sites):
        server, updates = draw(strategy, size, number)
        started = time.perf_counter()
        if way == "factors":
            aggregate(strategy, server, updates)
        else:
            dense(name, server, updates)
        seconds += time.perf_counter() - started
    after = resident("VmHWM")
    result |= {"seconds": seconds, "peak_bytes": None if after is None or before is None else after - before}
    return result if way == "dense" else result | {"largest_tensor": largest(name, size)}


def resident(key: str) -> int | None:
    """Bytes of resident memory: now (VmRSS) or at most so far (VmHWM); None where there is no /proc (not measured).

    getrusage would not do: a child inherits its parent's peak there.
    """
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    line = next(line for line in path.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def run(
    out: Path,
    sites: int = 224,
    m: int = 4096,
    n: int = 4096,
    r: int = 16,
    clients: int = 20,
    quick: bool = False,
    dense_sites: int = 1,
    tell: Tell = silent,
) -> dict[str, Any]:
    """Measure every method in a process of its own and write results.json to `out`.

    Args:
        sites, m, n, r: adapted layers, their shape and the rank.
        quick: 4 sites of 512 x 512 and 4 clients, whatever the sizes given.
        tell: is given a line for every measurement.
        dense_sites: sites on which the dense way is measured before it is scaled to `sites`.

    Raises:
        InputError: a size below 1, or r above min(m, n).
        RunError: a method is wrong on the small case.
    """
    size = Size(4, 512, 512, 8, 4) if quick else Size(sites, m, n, r, clients)
    if min(asdict(size).values()) < 1 or size.r > min(size.m, size.n) or not 1 <= dense_sites <= size.sites:
        raise InputError(
            f"bench server: {asdict(size)}, dense_sites={dense_sites}: all must be at least 1, r at most "
            "min(m, n), dense_sites at most sites."
        )
    rows, progress = [], Progress(tell, len(OPTIONS) + len(DENSE))
    for name in OPTIONS:
        row = {"method": name, **_child(name, size, "factors")}
        progress(f"{name}: {row['seconds']:.1f} s for {size.sites} sites")
        if name in DENSE:
            measured = _child(name, replace(size, sites=dense_sites), "dense")
            progress(f"{name}, dense: {measured['seconds']:.1f} s for {dense_sites} sites")
            row |= {
                "dense_sites": dense_sites,
                "dense_seconds": measured["seconds"],
                "dense_seconds_scaled": measured["seconds"] * size.sites / dense_sites,
                "dense_peak_bytes": measured["peak_bytes"],
            }
        rows.append(row)
    options = "--quick" if quick else " ".join(f"--{key} {value}" for key, value in asdict(size).items())
    versions = {"fedpeft": __version__, "torch": torch.__version__, "python": platform.python_version()}
    results = {
        "reproduce": f"fedpeft bench server --out DIR {options}",
        "size": asdict(size),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "adapter_bytes_all_clients": 4 * size.clients * size.sites * size.r * (size.m + size.n),
        "rows": rows,
    }
    files.write_bytes(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    return results


def _child(name: str, size: Size, way: str) -> dict[str, Any]:
    """`measure` in a fresh process, forked from one that has only imported this module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(measure, name, size, way).result()


def table(results: dict[str, Any]) -> Table:
    """Seconds, peak memory and largest tensor of each method, beside those of the dense way where it was measured."""
    from rich.table import Table

    size = results["size"]
    title = (
        f"aggregation of {size['sites']} sites of {size['m']} x {size['n']}, rank {size['r']}, "
        f"{size['clients']} clients, {results['threads']} thread(s), site by site"
    )
    made = Table("method", title=title, title_justify="left")
    for column in (
        "seconds",
        "peak MB",
        "largest tensor\n/ (m n)",
        "dense:\ns a site\n(measured)",
        f"dense:\ns for {size['sites']} sites\n(scaled, not measured)",
        "dense:\npeak MB",
    ):
        made.add_column(column, justify="right")
    for row in results["rows"]:
        share = row["largest_tensor"] / (size["m"] * size["n"])
        cells = [f"{row['seconds']:.1f}", _megabytes(row["peak_bytes"]), f"{share:.2%}"]
        if "dense_seconds" in row:
            cells += [
                f"{row['dense_seconds'] / row['dense_sites']:.2f}",
                f"{row['dense_seconds_scaled']:.0f}",
                _megabytes(row["dense_peak_bytes"]),
            ]
        made.add_row(row["method"], *cells)
    return made


def _megabytes(count: int | None) -> str:
    return "not measured" if count is None else f"{count / 1e6:.0f}"


def show(results: dict[str, Any]) -> None:
    """Print the table and the command that makes it."""
    from fedpeft.cli.console import out

    out.print(table(results))
    out.print(
        f"peak MB is above the imports and with one site in memory; the uploads of all sites are "
        f"{results['adapter_bytes_all_clients'] / 1e9:.2f} GB",
        style="dim",
    )
    out.print(f"REPRODUCE: {results['reproduce']}", soft_wrap=True)
