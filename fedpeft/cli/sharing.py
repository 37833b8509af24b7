"""What `fedpeft export` and `fedpeft push` print."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from fedpeft.cli import console


def exported(result: dict[str, Any]) -> None:
    """Where the folder is, and what is to be known of it, a line each."""
    console.pairs({key: value for key, value in result.items() if key != "notes"})
    for line in result.get("notes", []):
        console.out.print(f"- {line}.", soft_wrap=True)


def pushed(result: dict[str, Any]) -> None:
    """The files and where they go; of what was not sent the model card too, and how to send it."""
    table = Table("file", "bytes")
    for file in result["files"]:
        table.add_row(file["path"], f"{file['bytes']:,}")
    console.out.print(table)
    if not result["sent"]:
        console.out.print(result["card"], soft_wrap=True)
    for line in result["notes"]:
        console.out.print(f"- {line}.", soft_wrap=True)
    seen = "private" if result["private"] else "public"
    if result["sent"]:
        console.out.print(f"sent {result['bytes']:,} bytes to {result['url']}", soft_wrap=True)
        return
    where = f"{result['bytes']:,} bytes would go to the {seen} repo {result['repo']}"
    console.out.print(f"{where}, with this card. Nothing was sent; --yes sends it.", soft_wrap=True)
