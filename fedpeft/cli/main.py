"""The command line. Nothing heavy is imported before a command needs it, so that `fedpeft --help` answers at once."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated

import typer

from fedpeft import __version__
from fedpeft.cli import alive, console, hints, rounds, sharing
from fedpeft.cli.bench import bench_app
from fedpeft.cli.data import data_app
from fedpeft.cli.deploy import server_app, site_app
from fedpeft.cli.logged import Logged
from fedpeft.cli.offline import aggregate, merge
from fedpeft.cli.privacy import privacy_app
from fedpeft.cli.unlearning import unlearn
from fedpeft.errors import InputError, RunError, Stopped
from fedpeft.files import explain_error
from fedpeft.uncollected import uncollected
from fedpeft.unimported import try_without

app = typer.Typer(
    no_args_is_help=True,
    # typer's own tracebacks show local variables, which may be somebody's records.
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Federated and continual fine-tuning of peft adapters.",
)
app.add_typer(data_app, name="data")
app.add_typer(privacy_app, name="privacy")
app.add_typer(bench_app, name="bench")
app.add_typer(server_app, name="server")
app.add_typer(site_app, name="site")

Model = Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="A run folder, or an adapter folder.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer of a language model, in tokens.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ConfigName = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped config, as quickstart.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, as strategy.name=fedsvd run.rounds=5."),
]


@app.command()
def simulate(
    config: ConfigName,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; new or empty. Default: runs/NAME-1, -2, ...")] = None,
    as_json: Json = False,
) -> None:
    """Run a federation on this machine."""
    from fedpeft.config import parse_overrides, shortened

    given = shortened.rounds(config, parse_overrides(overrides or []))
    with uncollected():  # but for the rounds
        from fedpeft.simulations.run import simulate as run

        with rounds.Progress(quiet=as_json) as progress:
            summary = run(config, given, out, progress)
    console.emit(summary, as_json, console.run_result)


@app.command()
def resume(
    run_dir: Annotated[Path, typer.Argument(metavar="DIR", help="The run folder, as runs/quickstart-fedsvd-seed0.")],
    as_json: Json = False,
) -> None:
    """Go on with a run after its last complete round."""
    from fedpeft.record import result

    # Ahead of torch and the model, which nothing needs that is only shown again.
    if (done := result.load_ended(run_dir)) is not None:
        console.note(f"{run_dir}: the run has ended, after round {done['rounds']}. This is what it came to:")
        console.emit(done, as_json, console.run_result)
        return
    with uncollected():  # but for the rounds
        from fedpeft.simulations.run import resume as run

        with rounds.Progress(quiet=as_json) as progress:
            summary = run(run_dir, progress)
    console.emit(summary, as_json, console.run_result)


app.command()(aggregate)
app.command()(merge)
app.command()(unlearn)


@app.command("list")
def list_(
    table: Annotated[str | None, typer.Argument(help="strategies, adapters, datasets, configs, ...")] = None,
    as_json: Json = False,
) -> None:
    """List what can be named in a config."""
    from fedpeft.cli import catalogue

    console.emit(catalogue.entries(table, short=not as_json), as_json, console.listing)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Any listed name, as fedsvd, or table/name.")],
    as_json: Json = False,
) -> None:
    """Show one entry: options with defaults and meaning, paper, needs."""
    from fedpeft.cli import catalogue

    console.emit(catalogue.describe(name), as_json, console.entry)


@app.command()
def validate(
    config: ConfigName,
    overrides: Overrides = None,
    whole: Annotated[bool, typer.Option("--show", help="Print the config with every default written out.")] = False,
    traffic: Annotated[
        bool, typer.Option("--traffic", help="Load model and labels too, and say what a client sends and is sent.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a config without loading a model or data."""
    from fedpeft import config as configs

    tree = configs.read(config, overrides or [])
    checked = try_without(lambda: configs.complete(tree))
    result = {"valid": True, "config": configs.to_tree(checked)}
    if traffic:
        from fedpeft.run.traffic import count_round

        result["traffic"] = count_round(checked)
    console.emit(result, as_json, console.valid if whole else console.valid_line)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders.")],
    out: Annotated[Path | None, typer.Option(help="HTML file of a comparison.")] = None,
    as_json: Json = False,
) -> None:
    """Write a run's report again, or put several runs side by side."""
    from fedpeft.record import report as reports
    from fedpeft.record import side_by_side

    if len(runs) == 1:
        if out is not None:
            raise InputError(f"--out {out}: of a comparison; the report of one run is {runs[0] / 'report.html'}.")
        reports.write(runs[0])
        path = runs[0] / "report.html"
    else:
        path = side_by_side.compare(runs, out or Path("comparison.html"))
    result = {"report": str(path.absolute()), **side_by_side.said(runs), "runs": side_by_side.table(runs)}
    console.emit(result, as_json, console.comparison)


@app.command()
def watch(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN|COORDINATOR...", help="Run folders, at work or ended, or a coordinator's folder."),
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the state once, as JSON, and end.")] = False,
) -> None:
    """Serve a page for this machine that follows runs: rounds, curves, clients or sites, tasks, expected end."""
    from fedpeft.cli import watch as watching

    watched = watching.Watched(runs)
    if as_json:
        console.emit(watched.states(), True, console.pairs)
        return
    with watching.Server(watched, port) as server:
        console.out.print(f"{server.url}  (Ctrl-C ends it)", soft_wrap=True)
        # Ctrl-C is how it ends: no error, and exit code 0.
        with suppress(Stopped):
            server.serve_forever()


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")],
    to: Annotated[Path, typer.Option("--to", "--out", help="Target folder; new or empty.")],
    merge: Annotated[
        bool, typer.Option(help="Merge the adapter into the base model and save the whole model.")
    ] = False,
    best: Annotated[bool, typer.Option("--best", help="The best state, by run.best, in place of the last.")] = False,
    round_number: Annotated[
        int | None, typer.Option("--round", help="The state of a checkpoint that is still kept.", min=1)
    ] = None,
    base: Annotated[str | None, typer.Option(help="What others call the base model, as its id on the hub.")] = None,
    license_id: Annotated[str | None, typer.Option("--license", help="For the model card, as apache-2.0.")] = None,
    rank: Annotated[
        int | None, typer.Option(help="The first ranks alone, of an adapter whose ranks are nested (dylora).", min=1)
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a run's adapter, or with --merge the whole model, with all that others need to use it."""
    from fedpeft.run.export import export as run

    console.emit(run(run_dir, to, merge, best, round_number, base, license_id, rank), as_json, sharing.exported)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="RUN|FOLDER", help="A run, or a folder that `export` has written.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="A new repo is seen by its owner alone.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Send it; without this only what would be sent is said.")] = False,
    as_json: Json = False,
) -> None:
    """Send a run's adapter, or an exported folder, to the Hugging Face hub; without --yes only say what it would be."""
    from fedpeft.run.push import push as run

    console.emit(run(folder, repo, private, yes), as_json, sharing.pushed)


@app.command()
def predict(
    model: Model,
    data: Annotated[Path, typer.Option(help="File (or folder) of records; labels are not needed.")],
    out: Annotated[Path, typer.Option(help="File of the answers, .csv or .jsonl; not there yet.")],
    overrides: Overrides = None,
    max_new_tokens: MaxNewTokens = 64,
    as_json: Json = False,
) -> None:
    """Say what a trained model makes of the records of a file, in their order."""
    from fedpeft.run.predict import predict as run

    console.emit(run(model, data, out, overrides or [], max_new_tokens), as_json, console.pairs)


@app.command()
def chat(
    model: Model,
    overrides: Overrides = None,
    max_new_tokens: MaxNewTokens = 64,
    history: Annotated[
        bool, typer.Option("--history", help="Earlier turns belong to the next question; a blank line begins anew.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each question and answer as JSON, one a line.")
    ] = False,
) -> None:
    """Ask a trained language model: a question a line, an answer a line, until the input ends."""
    from fedpeft.run import chat as chats
    from fedpeft.run.trained import open_trained

    # Before the model is loaded, which takes its time.
    chats.require_settings(overrides or [])
    trained = open_trained(model, overrides or [])
    chats.require_language_model(trained, history)
    for question, answer in chats.answers(trained, _read_lines("> "), max_new_tokens, history, console.fail):
        sys.stdout.write((json.dumps({"question": question, "answer": answer}) if as_json else answer) + "\n")
        sys.stdout.flush()


@app.command()
def audit(config: ConfigName, overrides: Overrides = None, as_json: Json = False) -> None:
    """Test on a config's own steps what its privacy accountant assumes, and bound epsilon from below."""
    from fedpeft.run.audit.audit import run

    result = run(config, overrides or [])
    console.emit(result, as_json, console.audit_result)
    if not result["passed"]:
        raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Hold the options that come before a command; --version prints the version and ends."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


def _read_lines(prompt: str) -> Iterator[str]:
    """Lines of standard input until it ends; a terminal is asked for each.

    They are UTF-8, whatever the locale is; other bytes are half characters (surrogateescape), for the reader to refuse.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    while True:
        if sys.stdin.isatty():
            console.err.print(prompt, end="")
        line = sys.stdin.readline()
        if not line:
            return
        yield line


def _at_home(argument: str) -> str:
    """A path with its `~` replaced: no shell does that after `--out=` or between quotes."""
    option, equals, value = argument.partition("=")
    if equals and option.startswith("--") and value.startswith("~"):
        return f"{option}={os.path.expanduser(value)}"
    return os.path.expanduser(argument)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 2 bad config or input, 1 failed at run time, 130 Ctrl-C, 143 SIGTERM."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower's default is to report

    words = [_at_home(text) for text in (sys.argv[1:] if arguments is None else arguments)]
    command = _command_of(words)
    handler = Logged(resident=command in alive.RESIDENT)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[handler])
    # Of other packages only warnings; what ours say of a run they say at INFO.
    logging.getLogger("fedpeft").setLevel(logging.INFO)
    try:
        # In this order, so that a signal ends the thread of the signs of life too.
        with stopped_by_signals(), _watch_command(command):
            # Ahead of typer, which knows no key of a config.
            hints.refuse_config_options(words, app)
            app(words, prog_name="fedpeft")
    except InputError as error:
        console.fail(str(error))
        sys.exit(2)
    except RunError as error:
        console.fail(str(error))
        sys.exit(1)
    except OSError as error:  # a full disk, a missing right: the machine's, not the program's
        console.fail(explain_error(error))
        sys.exit(1)
    except Stopped as stop:
        console.note(f"{'interrupted' if stop.number == signal.SIGINT else 'terminated'}. {stop.advice}".strip())
        sys.exit(128 + stop.number)
    finally:
        handler.sum_up()


def _command_of(words: list[str]) -> str:
    """The name of the command that these words call, that of its group before it."""
    groups = {group.name for group in app.registered_groups}
    return " ".join(words[: 2 if words[:1] and words[0] in groups else 1])


def _watch_command(command: str) -> AbstractContextManager[None]:
    """Signs of life of a command, on standard error; a terminal has bars and notes instead."""
    return nullcontext() if console.err.is_terminal else alive.watched(command, console.note)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise `Stopped` in the main thread, so that what was begun is put away."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    # Python takes handlers in the main thread alone; `main` may be called from another one.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
