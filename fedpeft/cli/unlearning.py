"""`fedpeft unlearn` on the command line, and the table that it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fedpeft.cli import console
from fedpeft.record import unlearned


def unlearn(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run; it stays as it is.")],
    options: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="The method's options.")] = None,
    client: Annotated[str | None, typer.Option(help="Forget all records of this client.")] = None,
    task: Annotated[int | None, typer.Option(help="Forget this task of a sequence, by its number from 0 on.")] = None,
    records: Annotated[Path | None, typer.Option(help="Forget the records of this file.")] = None,
    method: Annotated[str, typer.Option(help="Registered way of unlearning.")] = "loku",
    against: Annotated[
        Path | None, typer.Option(help="What --method retrain has made of the same request, to measure by.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the result; new or empty.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make a model of a run without a client, a task or some records, and say what it still knows of them."""
    from fedpeft.unlearning.unlearn import unlearn as work

    given: dict[str, Any] = {"client": client, "task": task, "records": records, "against": against, "out": out}
    console.emit(work(run, method, options=options or [], **given), as_json, show)


def show(result: dict[str, Any]) -> None:
    """The table, what it cost, what privacy says of it, and the folder."""
    heads, rows = unlearned.table(result)
    table = Table(title=f"without {result['asked']['words']}, by {result['method']}")
    for head in heads:
        table.add_column(head, justify="right" if head else "left")
    for row in rows:
        table.add_row(*row)
    console.out.print(table)
    console.out.print(f"{unlearned.ATTACK} {unlearned.cost_of(result)}", style="dim")
    for line in result["privacy"]:
        console.out.print(line, style="yellow", soft_wrap=True)
    for line in result["notes"]:
        console.out.print(f"- {line}.", soft_wrap=True)
    console.out.print(result["out"], soft_wrap=True)
