"""The limit beside a figure: how long this machine takes for the products of a frozen base alone.

What an engine asks of the base is listed while it trains: every product with a frozen weight, and whether its input has
a gradient, which is another product. These are then made bare, one kind after another, with nothing around them.
"""

from __future__ import annotations

import platform
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedpeft.models.base import is_linear, orient
from fedpeft.models.products import multiply
from fedpeft.simulations.benchmarks.speed_engines import Engine
from fedpeft.simulations.benchmarks.speed_work import Work

REPEATS = 3


class Product(NamedTuple):
    """Inputs [rows, width] times a weight [outputs, width]; `backward` with the gradient in the inputs too."""

    rows: int
    outputs: int
    width: int
    backward: bool
    dtype: torch.dtype


def products_of(engine: Engine, case: Work) -> Counter[Product]:
    """Every product with the base's frozen weights that the engine makes in this work -> how often."""
    engine(replace(case, data=case.data[:1]))  # at its first call an engine may try things out on the base
    found: Counter[Product] = Counter()
    root: nn.Module = engine.model if isinstance(engine.model, nn.Module) else engine.model.base.backbone

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x, weight = inputs[0], module.get_parameter("weight")
        if not weight.requires_grad:
            outputs, width = orient(module, weight).shape
            found[Product(x.numel() // width, outputs, width, x.requires_grad, weight.dtype)] += 1

    hooks = [module.register_forward_pre_hook(note) for module in root.modules() if is_linear(module)]
    try:
        engine(case)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def bare_seconds(products: Counter[Product], device: torch.device) -> float:
    """CPU seconds (on a device, wall seconds) of these products and nothing else; each kind's best of REPEATS."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    total = 0.0
    for product, count in products.items():
        weight = torch.ones(product.outputs, product.width, dtype=product.dtype, device=device)
        x = torch.ones(product.rows, product.width, dtype=product.dtype, device=device)
        slope = torch.ones(product.rows, product.outputs, dtype=product.dtype, device=device)
        best = float("inf")
        for _ in range(REPEATS + 1):  # the first warms up
            begun = clock()
            multiply(x, weight)
            if product.backward:
                multiply(slope, weight.T)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            best = min(best, clock() - begun)
        total += count * best
    return total


def machine_name(device: torch.device) -> str:
    """What a figure is named after: the processor or device, and the instructions that torch uses on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    named = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    kind = named[1].strip() if named else platform.processor() or platform.machine()
    return f"{kind} ({torch.backends.cpu.get_cpu_capability()})"


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


def markdown(results: dict[str, Any]) -> str:
    """The table of one machine, to stand beside those of others."""
    lines = [
        f"### {results['machine']}, {results['threads']} thread, torch {results['versions']['torch']}",
        "",
        f"    {results['reproduce']}",
        "",
        "| model | clients | batch | engine | CPU seconds | times faster | % of the machine's products | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        faster = next((value for key, value in row.items() if key.startswith("cpu_ratio")), None)
        shown = (
            row["model"],
            row["clients"],
            row["batch"],
            row["engine"],
            f"{row['cpu_seconds']:.2f}",
            "" if faster is None else f"{faster:.2f}",
            share(row),
            "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
        )
        lines.append(f"| {' | '.join(map(str, shown))} |")
    return "\n".join([*lines, ""])


def share(row: dict[str, Any]) -> str:
    """How much of a row's time its bare products would take, in percent; empty where they were not timed."""
    bare = row.get("products_seconds")
    return "" if bare is None else f"{100 * bare / max(row['cpu_seconds'], 1e-9):.0f}"
