"""Where sampling and noise come from: the operating system, or a seed.

`OperatingSystem` is for real clients: every value is made of fresh bytes from the system's generator, by the Box-Muller
transform in float64, and nothing can reproduce it. `Seeded` is for simulations and tests: whoever knows the seed can
subtract the noise, so what it protects is reproducible and not private.

Floating-point Gaussians leave traces in the low bits (Mironov 2012); no released accountant covers them, nor this one.
"""

from __future__ import annotations

import os
from concurrent.futures import Executor
from typing import Protocol

import numpy as np

from fedpeft import seeds


class Randomness(Protocol):
    """A source of float64 values [count]: uniform in [0, 1), and standard normal."""

    def uniform(self, count: int) -> np.ndarray:
        """Independent values in [0, 1)."""

    def normal(self, count: int) -> np.ndarray:
        """Independent standard normal values."""


class OperatingSystem:
    """Fresh bytes of the operating system's generator."""

    def uniform(self, count: int) -> np.ndarray:
        bits = np.frombuffer(os.urandom(8 * count), dtype=np.uint64)
        # 53 bits are what a float64 in [0, 1) can hold evenly; all 64 would round some up to 1.
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(self, count: int) -> np.ndarray:
        half = (count + 1) // 2
        # log(1 - u) and not log(u): u can be 0 and is never 1.
        radius = np.sqrt(-2.0 * np.log1p(-self.uniform(half)))
        angle = 2.0 * np.pi * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


class Seeded:
    """A function of its seed: reproducible, not private."""

    def __init__(self, root: int, *path: int | str) -> None:
        self.generator = seeds.numpy_generator(root, *path)

    def uniform(self, count: int) -> np.ndarray:
        return self.generator.random(count)

    def normal(self, count: int) -> np.ndarray:
        return self.generator.standard_normal(count)


class Ahead:
    """The next `count` normal values of a source, drawn by a thread while a device computes. The same values."""

    def __init__(self, source: Randomness, count: int, threads: Executor) -> None:
        self.uniform = source.uniform
        self.drawn = threads.submit(source.normal, count)

    def normal(self, count: int) -> np.ndarray:
        values = self.drawn.result()
        if len(values) != count:
            # A shorter or longer draw would shift every later value of the source.
            raise RuntimeError(f"{len(values)} values were drawn ahead; asked for {count}.")
        return values
