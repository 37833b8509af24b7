"""`fedpeft aggregate` and `fedpeft merge` on the command line: adapter folders, without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli import console

Base = Annotated[
    str | None,
    typer.Option(help="The base model of all, to be named in the result; says that unlike names mean one model."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


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
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Aggregate peft adapter folders once, offline."""
    from fedpeft.run.offline import aggregate_folders, parse_numbers

    options, folders = options_and_folders(arguments)
    numbers = parse_numbers("--weights", weights)
    result = aggregate_folders(strategy, folders, out, options, numbers, start, base)
    console.emit(result, as_json, console.aggregate_result)


def merge(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="[KEY=VALUE]... ADAPTER_DIR...", help="Merger options and peft folders, oldest first."),
    ],
    method: Annotated[str, typer.Option(help="Registered merger.")],
    out: Annotated[Path, typer.Option(help="Folder of the result; new or empty.")],
    numbers: Annotated[
        str | None, typer.Option(help="A number for each adapter, as 1,-1: weights, losses; what the merger takes.")
    ] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Merge peft adapter folders that were trained one after another."""
    from fedpeft.run.offline import merge_folders, parse_numbers

    options, folders = options_and_folders(arguments)
    result = merge_folders(method, folders, out, options, parse_numbers("--numbers", numbers), base)
    console.emit(result, as_json, console.aggregate_result)


def options_and_folders(arguments: list[str]) -> tuple[list[str], list[Path]]:
    """Arguments `key=value` that are no existing path, and the paths."""
    # A folder's name may hold a `=`: what is there is a folder.
    options = [text for text in arguments if "=" in text and not Path(text).exists()]
    return options, [Path(text) for text in arguments if text not in options]
