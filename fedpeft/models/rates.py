"""How fast this machine multiplies in each dtype that a frozen base can have, by the base's own products.

Flags of a processor do not say it: bfloat16 is twice as fast as float32 on one without AMX and slower on another, so it
is timed. A rate at a few hundred rows is that of a whole pass, and so is that of a slice of a large weight.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from fedpeft.models.base import is_linear, orient
from fedpeft.models.products import multiply

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FASTER = 1.5  # times, that bfloat16 has to be for what it rounds
BUDGET_S = 0.08  # of all that is timed
KINDS = 4  # shapes that are timed, those with the most work
ROWS, MOST_ROWS = 16, {"cpu": 256}  # of the first look and of the measurement; on a device the latter is 8192
WIDEST = {"cpu": 1024}  # of a slice of a weight; on a device 4096
REPEATS = 2

Shapes = Mapping[tuple[int, int], int]


def shapes_of(model: nn.Module) -> Counter[tuple[int, int]]:
    """(outputs, inputs) of the model's linear layers -> how many layers have it."""
    layers = (module for module in model.modules() if is_linear(module))
    shapes = (orient(layer, layer.get_parameter("weight")).shape for layer in layers)
    return Counter((outputs, inputs) for outputs, inputs in shapes)


def measure(shapes: Shapes, device: torch.device) -> dict[str, float]:
    """GFLOP/s of the products of layers of these shapes in each dtype, in at most some 0.1 s.

    Args:
        shapes: as of `shapes_of`, at least one.
    """
    counted = sorted(shapes.items(), key=lambda item: -item[0][0] * item[0][1] * item[1])[:KINDS]
    work, spent = 0.0, dict.fromkeys(DTYPES, 0.0)
    for (outputs, inputs), count in counted:
        part = 2e-9 * outputs * inputs * count
        work += part
        for name, rate in _time_shape(outputs, inputs, device, BUDGET_S / len(counted)).items():
            spent[name] += part / rate
    return {name: work / seconds for name, seconds in spent.items()}


def choose(rates: Mapping[str, float]) -> str:
    """The dtype to hold a base in."""
    return "bfloat16" if rates["bfloat16"] >= FASTER * rates["float32"] else "float32"


def _time_shape(outputs: int, inputs: int, device: torch.device, budget_s: float) -> dict[str, float]:
    """GFLOP/s of one shape in each dtype; by turns, so that a slow moment of the machine hits both."""
    widest = WIDEST.get(device.type, 4096)
    shape = (min(outputs, widest), min(inputs, widest))

    def best(rows: int) -> dict[str, float]:
        turns = [{name: seconds(shape, rows, dtype, device) for name, dtype in DTYPES.items()} for _ in range(REPEATS)]
        return {name: min(turn[name] for turn in turns) for name in DTYPES}

    begun = clock(device)
    rows, times = ROWS, best(ROWS)  # which also warms it up
    left = budget_s - (clock(device) - begun)
    # A dtype without instructions of its own may be ten times slower: then fewer rows, which show it as well.
    affordable = int(rows * left / (REPEATS * sum(times.values())))
    if affordable > rows:
        rows = min(affordable, MOST_ROWS.get(device.type, 8192))
        times = best(rows)
    return {name: 2e-9 * rows * shape[0] * shape[1] / value for name, value in times.items()}


@torch.no_grad()
def seconds(shape: tuple[int, int], rows: int, dtype: torch.dtype, device: torch.device) -> float:
    """Of one product of `rows` inputs with a weight [outputs, inputs]."""
    weight = torch.ones(shape, dtype=dtype, device=device)
    x = torch.ones(rows, shape[1], dtype=dtype, device=device)
    _wait_device(device)
    begun = clock(device)
    multiply(x, weight)
    _wait_device(device)
    return max(clock(device) - begun, 1e-9)


def clock(device: torch.device) -> float:
    """Seconds: of the CPU where that is what computes, as other work on the machine would turn the answer."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def _wait_device(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
