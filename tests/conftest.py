"""Shared by all tests: one thread, no telemetry, no hub, float64, checkpoints, and a simulation of half a second."""

from __future__ import annotations

import gc
import multiprocessing
import os

os.environ.update(FLWR_TELEMETRY_ENABLED="0", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

# The tree of commands takes a tenth of a second to build, and tests call commands many hundred times.
typer.main.get_command = cache(typer.main.get_command)
pytest.register_assert_rewrite("support")
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What was imported stays: a collection of garbage need not look at a million objects of torch and transformers.

    Flower collects for each array record that it reads, which made seconds of what takes milliseconds.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """`tiny(name, config)` runs a tiny simulation into tmp_path/name and returns its summary, without plots."""
    from fedpeft.record import report
    from fedpeft.simulations.run import simulate
    from support.methods import TINY

    monkeypatch.setattr(report, "write", lambda run: [])

    def run(name: str = "run", config: dict[str, Any] | None = None, **arguments: Any) -> dict[str, Any]:
        return simulate({}, {**TINY, **(config or {})}, tmp_path / name, **arguments)

    return run


@pytest.fixture
def interrupted(tiny: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """`interrupted(name, config, at=2)` is `tiny`, ended as round `at` is recorded: its checkpoint is not written."""

    def run(name: str, config: dict[str, Any] | None = None, at: int = 2) -> None:
        def stop(event: dict[str, Any]) -> None:
            if event["event"] == "round" and event["round"] == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tiny(name, config, on_event=stop)

    return run


@pytest.fixture
def ends_alike(
    tiny: Callable[..., dict[str, Any]], interrupted: Callable[..., None], tmp_path: Path
) -> Callable[[dict[str, Any]], None]:
    """`ends_alike(config)` checks that a run that was interrupted ends with the bits of one that was not."""

    def check(config: dict[str, Any]) -> None:
        from fedpeft.simulations.run import resume

        tiny("whole", config)
        interrupted("half", config, at=2)
        resume(tmp_path / "half")
        whole, half = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "half"))
        assert whole.read_bytes() == half.read_bytes()

    return check


@pytest.fixture
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are made and never painted, which would take most of a report's time: their files are no images."""
    from fedpeft.record import drawing

    monkeypatch.setattr(drawing, "png", lambda figure: b"\x89PNG")


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes are forked, with all imported; fresh ones, which test_engines has, import for seconds."""
    from fedpeft.simulations import workers

    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda method: fork)


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything in float64, casts to float32 included, so that an identity of real numbers holds to 1e-10."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("vit", tmp_path_factory)


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("bert", tmp_path_factory)


@pytest.fixture(scope="session")
def language_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: saved(kind, tmp_path_factory) for kind in ("llama", "gpt2")}


def saved(kind: str, factory: pytest.TempPathFactory) -> Path:
    from support import small_models

    return small_models.save(kind, factory.mktemp("models") / kind)
