"""`fedpeft bench`: the benchmarks on the command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fedpeft import folders
from fedpeft.cli import console
from fedpeft.config import shortened
from fedpeft.errors import InputError, Stopped

bench_app = typer.Typer(no_args_is_help=True, help="Benchmarks: each writes results.json, a table and plots.")

# What is gone on with.
CELLS = ("cells", "manifests", "sources", "state", "results.json", "report.html", "*.png", "*.svg", "*.pdf")
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@bench_app.command("federated")
def bench_federated(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    seeds: Annotated[int, typer.Option(min=2, help="Runs of each cell.")] = 8,
    quick: Annotated[bool, typer.Option(help="A small version, to see that it runs.")] = False,
    as_json: Json = False,
) -> None:
    """Federated LoRA rules under sample-level DP and label skew, at one learning rate and at each rule's own."""
    with _open_folder("federated", out) as out:
        from fedpeft.simulations.benchmarks import federated, federated_report

        # A paired difference has no error with one run of each.
        result = federated.run(out, shortened.seeds(seeds, 2), quick, tell=console.note)
        console.emit(result, as_json, federated_report.show)


@bench_app.command("private")
def bench_private(
    out: Annotated[Path, typer.Option(help="Folder of the results; finished cells in it are not run again.")],
    seeds: Annotated[int, typer.Option(min=2, help="Runs of each cell.")] = 3,
    quick: Annotated[bool, typer.Option(help="A small version, to see that it runs.")] = False,
    as_json: Json = False,
) -> None:
    """FedIT, FFA-LoRA and FedSVD on a real model at several epsilons."""
    with _open_folder("private", out, own=CELLS) as out:
        from fedpeft.simulations.benchmarks import private

        console.emit(private.run(out, shortened.seeds(seeds, 2), quick, console.note), as_json, private.show)


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
    with _open_folder("server", out) as out:
        from fedpeft.simulations.benchmarks import server_cost

        sizes = {"sites": sites, "m": m, "n": n, "r": r, "clients": clients}
        console.emit(server_cost.run(out, **sizes, quick=quick, tell=console.note), as_json, server_cost.show)


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
    with _open_folder("speed", out) as out:
        from fedpeft.simulations.benchmarks import speed

        lists: dict[str, Any] = {
            "models": _split_list(models),
            "engines": _split_list(engines),
            "clients": _parse_numbers("clients", clients),
            "batch": _parse_numbers("batch", batch),
        }
        given: dict[str, Any] = {"repeats": repeats, "seq": seq, "steps": steps, "quick": quick, "device": device}
        console.emit(speed.run(out, **lists, **given, tell=console.note), as_json, speed.show)


@bench_app.command("memory")
def bench_memory(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    clients: Annotated[str, typer.Option(help="Numbers of virtual clients, with commas between.")] = "100,1000,10000",
    as_json: Json = False,
) -> None:
    """Peak memory of a simulated run against the number of its clients, 64 of which are asked a round."""
    with _open_folder("memory", out) as out:
        from fedpeft.simulations.benchmarks import memory

        console.emit(memory.run(out, _parse_numbers("clients", clients), console.note), as_json, memory.show)


@bench_app.command("scale")
def bench_scale(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    axes: Annotated[
        str,
        typer.Option(
            help="What grows, with commas between: clients, asked, records, rank, tokens, layers, classes, tasks; all "
            "by default."
        ),
    ] = "",
    quick: Annotated[bool, typer.Option(help="Small sizes, to see that it runs.")] = False,
    as_json: Json = False,
) -> None:
    """Seconds and memory of a run as its clients, model, records or tasks grow, with the exponent of each."""
    with _open_folder("scale", out) as out:
        from fedpeft.simulations.benchmarks import scale

        console.emit(scale.run(out, _split_list(axes), quick, console.note), as_json, scale.show)


@bench_app.command("sites")
def bench_sites(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    sites: Annotated[int, typer.Option(min=3, help="Light sites, all of which are asked in every round.")] = 200,
    rounds: Annotated[int, typer.Option(min=1)] = 10,
    secagg: Annotated[bool, typer.Option("--secagg", help="Secure sums, each site in a group of others.")] = False,
    late: Annotated[int, typer.Option(min=0, help="Every how many-th site answers late; 0 is none.")] = 0,
    as_json: Json = False,
) -> None:
    """Rounds of a real coordinator with many light sites over gRPC and TLS: seconds, and memory after each."""
    with _open_folder("sites", out) as out:
        from fedpeft.simulations.benchmarks import sites as bench

        console.emit(bench.run(out, sites, rounds, secagg, late, console.note), as_json, bench.show)


@bench_app.command("data")
def bench_data(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    data: Annotated[Path | None, typer.Option(help="Folder where texts and photos are made, and stay.")] = None,
    texts: Annotated[int, typer.Option(min=0, help="Texts of 60 tokens; 0 leaves them out.")] = 300_000,
    photos: Annotated[int, typer.Option(min=0, help="JPEGs of 224 x 224; 0 leaves them out.")] = 20_000,
    rival: Annotated[int, typer.Option(min=0, help="Photos of the comparison with a plain loop; 0 is none.")] = 5000,
    unequal: Annotated[
        int, typer.Option(min=0, help="Photos of unequal size, changed in every pass, of one to a result; 0 is none.")
    ] = 5000,
    engines: Annotated[str, typer.Option(help="Processes: one, workers, ray.")] = "one,workers,ray",
    repeats: Annotated[int, typer.Option(min=1, help="Times that a comparison is run.")] = 3,
    quick: Annotated[bool, typer.Option(help="A small version, to see that it runs.")] = False,
    as_json: Json = False,
) -> None:
    """Memory, start and rate of runs over many texts and photos, and a plain loop of other libraries beside ours."""
    with _open_folder("data", out) as out:
        from fedpeft.simulations.benchmarks import data as bench

        sizes = {"texts": texts, "photos": photos, "rival": rival, "unequal": unequal, "repeats": repeats}
        result = bench.run(out, data, engines=_split_list(engines), **sizes, quick=quick, tell=console.note)
        console.emit(result, as_json, bench.show)


@bench_app.command("tta")
def bench_tta(
    out: Annotated[Path, typer.Option(help="Folder of the results; finished cells in it are not run again.")],
    stream: Annotated[
        str,
        typer.Option(
            help="Streams, with commas between: digits-c/KIND, vader/movie, debian/en, "
            "glyphs/text, fashion-mnist; options after a colon "
            "(digits-c/dirichlet:delta=0.1,batch=16)."
        ),
    ] = "digits-c/iid",
    methods: Annotated[
        str,
        typer.Option(
            help="Methods, with commas between, options after a colon "
            "(lame:base=bn_adapt); all by default. Baselines always run."
        ),
    ] = "",
    models: Annotated[str, typer.Option(help="Source models, with commas between; all of the stream by default.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each cell.")] = 3,
    quick: Annotated[bool, typer.Option(help="A small version, to see that it runs.")] = False,
    as_json: Json = False,
) -> None:
    """Test-time methods on drifting streams, built in or of prepared real records: error, calibration, cost."""
    with _open_folder("tta", out, own=CELLS) as out:
        from fedpeft.simulations.benchmarks import tta, tta_report

        result = tta.run(out, stream, methods, models, shortened.seeds(seeds), quick, console.note)
        console.emit(result, as_json, tta_report.show)


@bench_app.command("continual")
def bench_continual(
    out: Annotated[Path, typer.Option(help="Folder of the results; finished cells in it are not run again.")],
    stream: Annotated[str, typer.Option(help="Stream, options after a colon: glyph1d:tasks=20.")] = "digits5",
    bodies: Annotated[
        str,
        typer.Option(
            help="Bodies, with commas between: frozen,lae. Options after a colon, also "
            "with commas: coso:side=in,r1=4,lae (two bodies). All by default."
        ),
    ] = "",
    heads: Annotated[
        str,
        typer.Option(
            help="Heads, written like bodies; linear, ncm, lda and ranpac by default. lda and ranpac always run."
        ),
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each cell.")] = 3,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="How all bodies are trained: "
            "epochs, batch_size, lr, head_lr, temperature. Can be given more than once.",
        ),
    ] = None,
    validation: Annotated[
        bool, typer.Option("--validation", help="Test on a part of the training set, to choose settings by.")
    ] = False,
    quick: Annotated[bool, typer.Option(help="A small version, to see that it runs.")] = False,
    as_json: Json = False,
) -> None:
    """Continual learning on a stream of tasks: accuracy, forgetting, bytes kept and cost of bodies and heads."""
    with _open_folder("continual", out, own=CELLS) as out:
        from fedpeft.simulations.benchmarks import continual, continual_report

        given: dict[str, Any] = {"quick": quick, "validation": validation, "settings": settings, "tell": console.note}
        result = continual.run(out, stream, bodies, heads, shortened.seeds(seeds), **given)
        console.emit(result, as_json, continual_report.show)


@bench_app.command("unlearn")
def bench_unlearn(
    out: Annotated[Path, typer.Option(help="Folder of the results; finished cells in it are not run again.")],
    sets: Annotated[
        str, typer.Option(help="digits, and vader, which is prepared before; with commas between; all by default.")
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each cell.")] = 3,
    quick: Annotated[bool, typer.Option(help="A small version, to see that it runs.")] = False,
    as_json: Json = False,
) -> None:
    """What each way of unlearning a client leaves of it, beside the run as trained and the run without the client."""
    with _open_folder("unlearn", out, own=(*CELLS, "runs")) as out:
        from fedpeft.simulations.benchmarks import unlearn

        result = unlearn.run(out, _split_list(sets), shortened.seeds(seeds), quick, console.note)
        console.emit(result, as_json, unlearn.show)


@bench_app.command("adapters")
def bench_adapters(
    out: Annotated[Path, typer.Option(help="Folder of the results; finished cells in it are not run again.")],
    sets: Annotated[
        str, typer.Option(help="texts, characters, which are prepared before; with commas between; all by default.")
    ] = "",
    adapters: Annotated[
        str, typer.Option(help="Parameterisations beside LoRA, with commas between; all by default.")
    ] = "",
    seeds: Annotated[int, typer.Option(min=2, help="Runs of each at its best rate.")] = 3,
    quick: Annotated[bool, typer.Option(help="A small version, to see that it runs.")] = False,
    as_json: Json = False,
) -> None:
    """What parameterisations reach at LoRA's upload on real encoders, each at its own rate, without and with DP."""
    with _open_folder("adapters", out, own=(*CELLS, "run")) as out:
        from fedpeft.simulations.benchmarks import adapters as bench

        result = bench.run(
            out, _split_list(sets), _split_list(adapters), shortened.seeds(seeds, 2), quick, console.note
        )
        console.emit(result, as_json, bench.show)


@bench_app.command("dtype")
def bench_dtype(
    out: Annotated[Path, typer.Option(help="Folder of the results; finished cells in it are not run again.")],
    sets: Annotated[
        str, typer.Option(help="texts, characters, which are prepared before; with commas between; all by default.")
    ] = "",
    seeds: Annotated[int, typer.Option(min=2, help="Runs of each cell.")] = 5,
    quick: Annotated[bool, typer.Option(help="A small version, to see that it runs.")] = False,
    as_json: Json = False,
) -> None:
    """Accuracy and loss over a frozen base in bfloat16 beside the same runs in float32, without and with DP."""
    with _open_folder("dtype", out, own=(*CELLS, "run")) as out:
        from fedpeft.simulations.benchmarks import dtype

        result = dtype.run(out, _split_list(sets), shortened.seeds(seeds, 2), quick, console.note)
        console.emit(result, as_json, dtype.show)


@contextmanager
def _open_folder(name: str, out: Path, own: tuple[str, ...] = ()) -> Iterator[Path]:
    """The folder of a benchmark's results, held by this process; says at once that there is life.

    Args:
        own: names of results that are gone on with; none: the folder must be new or empty.
    """
    console.note(f"bench {name}: loading ...")
    # There is no default name: --out has to be given.
    with folders.new(out, Path(), own=own) as made:
        try:
            yield made.path
        except BaseException as error:
            if isinstance(error, Stopped) and own:
                error.advice = f"What is finished stays in {made.path}; the same command goes on with the rest."
            # As far as the folder is empty: cells that are finished are gone on with.
            made.undo(folders.LOCK)
            raise


def _split_list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _parse_numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _split_list(text))
    except ValueError as error:
        raise InputError(f"--{option}: '{text}' is not a list of whole numbers like 8,64.") from error
