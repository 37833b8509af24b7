"""What the command line says of words that are no option of its own, and the help of arguments."""

from __future__ import annotations

import dataclasses
from typing import Any

import typer.main
from typer.core import TyperArgument

from fedpeft.errors import InputError


class Argument(TyperArgument):
    """An argument that keeps its help: click from 8.4 on has one of its own, and sets typer's to none."""

    def __init__(self, *, help: str | None = None, **more: Any) -> None:
        super().__init__(help=help, **more)
        self.help = help


setattr(typer.main, "TyperArgument", Argument)  # noqa: B010, as typer does not export it


def refuse_config_options(words: list[str], app: typer.Typer) -> None:
    """Refuse `--rounds 3`, where the command has no such option and a config has such a key.

    Raises:
        InputError: says how the key is given.
    """
    unknown = [
        word for word in words if word.startswith("--") and word.partition("=")[0] not in _options_of(words, app)
    ]
    for word in unknown:
        flag, _, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        for key in _keys_named(name):
            raise InputError(f"{flag}: no option of this command. It is a key of the config: {key}={value or '...'}")


def _options_of(words: list[str], app: typer.Typer) -> set[str]:
    """Options of the command that these words call; of an unknown one that of none."""
    command: Any = typer.main.get_command(app)
    known = {"--help", "--install-completion", "--show-completion"}
    # One word more, or the options of the last command would not be looked at.
    for word in [*words, ""]:
        known |= {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
        below = getattr(command, "commands", {})
        if word not in below:
            return known
        command = below[word]
    return known


def _keys_named(name: str) -> list[str]:
    """Dotted keys of a config whose last part, or whole, is this."""
    from fedpeft import config as configs

    found = []
    for section in dataclasses.fields(configs.Config):
        options = dataclasses.fields(type(getattr(configs.Config(), section.name)))
        found += [
            f"{section.name}.{item.name}" for item in options if name in (item.name, f"{section.name}_{item.name}")
        ]
    return found
