"""What the command line says to somebody who has mistyped, who pipes its output, or who waits."""

from __future__ import annotations

import pytest
import typer

from fedpeft.cli import catalogue, hints, main, rounds
from fedpeft.data.columns import require_named
from fedpeft.data.tables import Table
from fedpeft.errors import InputError
from fedpeft.strategies.wire import ERROR


def test_a_config_key_given_as_an_option_is_said_as_a_key():
    with pytest.raises(InputError, match=r"--rounds: no option of this command.*run\.rounds=3"):
        hints.refuse_config_options(["simulate", "quickstart", "--rounds=3"], main.app)
    with pytest.raises(InputError, match=r"strategy\.name=\.\.\."):
        hints.refuse_config_options(["server", "run", "DIR", "x", "--strategy-name"], main.app)
    for words in (
        ["simulate", "quickstart", "--out", "x", "--json"],
        ["aggregate", "--strategy", "fedit", "--weights", "1"],
        ["server", "run", "DIR", "x", "--detach"],
        ["--version"],
        ["--install-completion"],
        ["simulate", "--nothing-like-a-key"],
    ):
        hints.refuse_config_options(words, main.app)


def test_an_unknown_name_has_three_suggestions_and_not_all_names():
    with pytest.raises(InputError) as caught:
        catalogue.describe("fedsvdd")
    assert "Did you mean 'fedsvd'" in str(caught.value) and "`fedpeft list`" in str(caught.value)
    assert len(str(caught.value)) < 200
    for name in ("partition", "data.partition"):
        with pytest.raises(InputError, match=r"data\.partition.*`fedpeft list partitioners`"):
            catalogue.describe(name)
    with pytest.raises(InputError, match=r"run\.rounds. `fedpeft show run` has it"):
        catalogue.describe("rounds")


def test_the_section_of_data_has_its_partition():
    rows = {row["name"]: row for row in catalogue.describe("data")["options"]}
    assert "dirichlet" in rows["partition"]["allowed"] and rows["partition"]["default"] == "dirichlet"


def test_every_argument_has_its_help(capsys):
    commands = typer.main.get_command(main.app).commands
    arguments = [
        (name, parameter.name)
        for name, command in commands.items()
        for parameter in command.params
        if parameter.param_type_name == "argument" and not parameter.help
    ]
    assert arguments == []
    with pytest.raises(SystemExit):
        main.app(["simulate", "--help"], prog_name="fedpeft")
    assert "quickstart" in capsys.readouterr().out


def test_a_round_says_which_how_long_and_how_long_all_others_will_take(capsys):
    event = {"event": "round", "clients": ["a", "b"], "train_loss": 0.5, "accuracy": 0.25}
    with rounds.Progress(quiet=False) as progress:
        progress({"event": "folder", "path": "runs/one", "given": True})
        progress({"event": "start", "rounds": 20, "strategy": "fedit", "clients": 2, "trainable_parameters": 10})
        progress({**event, "round": 3, "seconds": 0.9})
        progress({**event, "round": 20, "seconds": 0.9})
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "loading model and data"
    assert said[2] == "round 3/20, 0.9 s, 15 s left: 2 clients, train loss 0.500, accuracy 25.0%"
    assert said[3].startswith("round 20/20, 0.9 s: 2 clients")


def test_all_wrong_columns_are_in_one_error():
    table = Table({"a": ["x"], "b": ["y"]}, "letters.csv")
    with pytest.raises(
        InputError, match=r"data\.text=foo and data\.label=bar: no such columns in letters\.csv.* a, b\."
    ):
        require_named(table, {"text": "foo", "label": "bar", "image": None})
    require_named(table, {"text": "foo", "label": "b", "image": None})  # a single one is told with suggestions


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("<class 'RuntimeError'>:<'Injected crash'>", "RuntimeError: 'Injected crash'"),
        ("<class 'ray.exceptions.ActorDiedError'>:<'It died\n\tat once.'>", "ActorDiedError: 'It died\n\tat once.'"),
        ("<class 'a.b.Odd'>:<'x > y'> at faults.py:50", "Odd: 'x > y' at faults.py:50"),
        ("plain words", "plain words"),
    ],
)
def test_an_exception_is_not_shown_as_pythons_own_text(given, said):
    assert ERROR.sub(r"\1: \2", given) == said
