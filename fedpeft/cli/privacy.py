"""`fedpeft privacy`: the calculator on the command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedpeft.cli import console

privacy_app = typer.Typer(no_args_is_help=True, help="A calculator for sample-level differential privacy.")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
SampleRate = Annotated[float, typer.Option(help="Chance of a record to be in a step's batch.")]
Steps = Annotated[int, typer.Option(help="Local steps of all rounds that the client joins.")]
Delta = Annotated[float, typer.Option(help="Delta; below one over the number of records.")]
Accountant = Annotated[str, typer.Option(help="pld (tight), prv (Opacus) or rdp.")]


@privacy_app.command("epsilon")
def privacy_epsilon(
    sample_rate: SampleRate,
    noise_multiplier: Annotated[float, typer.Option(help="Noise over clipping norm.")],
    steps: Steps,
    delta: Delta,
    accountant: Accountant = "pld",
    as_json: Json = False,
) -> None:
    """Epsilon that training with this noise costs."""
    from fedpeft.privacy import accounting

    given: dict[str, Any] = {"sample_rate": sample_rate, "noise_multiplier": noise_multiplier}
    given |= {"steps": steps, "delta": delta}
    found = accounting.epsilon(**given, accountant=accountant)
    assumptions = list(accounting.ASSUMPTIONS)
    if accounting.is_bounded(((sample_rate, noise_multiplier, steps),), delta, accountant):
        assumptions.append(accounting.BOUNDED)
    result = {"epsilon": found, **given, "accountant": accountant, "assumptions": assumptions}
    console.emit(result, as_json, console.privacy)


@privacy_app.command("noise")
def privacy_noise(
    sample_rate: SampleRate,
    epsilon: Annotated[float, typer.Option(help="Target.")],
    steps: Steps,
    delta: Delta,
    accountant: Accountant = "pld",
    as_json: Json = False,
) -> None:
    """Noise multiplier that keeps training within this epsilon."""
    from fedpeft.privacy import accounting

    given: dict[str, Any] = {"sample_rate": sample_rate, "epsilon": epsilon, "steps": steps, "delta": delta}
    found = accounting.noise_multiplier(**given, accountant=accountant)
    assumptions = list(accounting.ASSUMPTIONS)
    if accounting.is_bounded(((sample_rate, found, steps),), delta, accountant):
        assumptions.append(accounting.BOUNDED)
    result = {"noise_multiplier": found, **given, "accountant": accountant, "assumptions": assumptions}
    console.emit(result, as_json, console.privacy)


@privacy_app.command("ledger")
def privacy_ledger(
    path: Annotated[Path, typer.Argument(help="A ledger file, or the folder of a run.")],
    delta: Delta = 1e-5,
    accountant: Accountant = "pld",
    as_json: Json = False,
) -> None:
    """What has been released and what it costs, from the ledgers on the disk."""
    from fedpeft.privacy import ledger

    console.emit(ledger.read_account(path, delta, accountant), as_json, console.ledgers)
