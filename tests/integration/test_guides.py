"""Every command of README.md, docs/ and DEPLOY.md works as it is written there."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import typer

from fedpeft import config as configs
from fedpeft.cli.main import app
from support.deployed import free_ports
from support.guides import COMMANDS, DEPLOY, GUIDES, README, ROOT, at_hand, commands, foretold, masked, script

GROUP = typer.main.get_command(app)
TAKES_CONFIG = ("simulate", "audit")
ALL = [words for guide in GUIDES for words in commands(guide)]
# What they write by hand before a command reads it.
FILES = [
    pair
    for guide in GUIDES
    for pair in re.findall(r"^cat > (\S+\.yaml) <<'EOF'\n(.*?)^EOF$", script(guide), re.M | re.S)
]


def leaf(words):
    """The command that these words name, and the words after its name."""
    command, words = GROUP, list(words)
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"no command {' '.join(words)!r}"
        command = command.commands[words.pop(0)]
    return command, words


def test_the_guides_are_read():
    assert len(ALL) - len(commands(DEPLOY)) >= 18 and len(commands(DEPLOY)) >= 18
    assert ["audit", "fedsvd_dp"] in ALL and ["site", "start", "north"] in ALL


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_a_command_s_arguments_config_and_overrides_are_right(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES:
        (tmp_path / name).write_text(text)
    command, rest = leaf(words)
    context = command.make_context(command.name, list(rest))  # raises what a wrong argument or option raises
    if words[0] in TAKES_CONFIG or words[:2] == ["server", "run"]:
        configs.load(context.params["config"], context.params["overrides"] or [])


CHANGES = re.findall(r"^\| .+? \| `([a-z_.]+=.+)` \|$", (ROOT / "docs" / "tutorial_csv.md").read_text(), re.M)


@pytest.mark.parametrize("words", CHANGES)
def test_what_the_tutorial_says_to_change_is_taken(words, tmp_path):
    assert len(CHANGES) >= 4
    (tmp_path / "wards.yaml").write_text(dict(FILES)["wards.yaml"])
    configs.load(str(tmp_path / "wards.yaml"), words.split())


def test_results_go_to_folders_of_their_own():
    outs = [words[words.index(flag) + 1] for words in ALL for flag in ("--out", "--to") if flag in words]
    outs += [out for guide in GUIDES for out in re.findall(r'out="([^"]+)"', guide.read_text())]
    assert len(outs) >= 4 and len(set(outs)) == len(outs)


def test_the_commands_and_options_of_the_table_exist():
    column = "\n".join(re.findall(r"^\| (`.+?) \|", COMMANDS.read_text(), re.MULTILINE))
    named = [text for text in re.findall(r"`([^`]+)`", column) if re.match(r"(fedpeft )?[a-z]+( |$)", text)]
    named = [text.removeprefix("fedpeft ") for text in named if text.split()[-1] != "..."]
    shown = [text for text in named if text.split()[0] in GROUP.commands]
    assert len(shown) >= 20
    for text in shown:
        command, rest = leaf(text.split())
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", " ".join(rest))) <= known, text


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_command_of_the_guides_in_their_order_in_one_folder(tmp_path):
    at_hand(tmp_path)
    assert re.findall("^make test .*\n", script(README), re.MULTILINE), "the one line left out: it would run this test"
    text = re.sub("^make test .*\n", "", "".join(map(script, GUIDES)), flags=re.MULTILINE)
    for fixed, free in zip(("9092", "9093"), free_ports(2), strict=True):
        text = text.replace(fixed, str(free))
    trap = "trap 'echo \"FAILED: $BASH_COMMAND\" >&2' ERR\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n"
    (tmp_path / "guides.sh").write_text(trap + text)
    short = {"FEDPEFT_ROUNDS": "2", "FEDPEFT_SEEDS": "1", "COLUMNS": "200"}
    with (tmp_path / "said.txt").open("w") as said:
        done = subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "guides.sh"],
            cwd=tmp_path,
            timeout=2900,
            stdout=said,
            stderr=said,
            env={**os.environ, **short},
        )
    told = (tmp_path / "said.txt").read_text()
    assert done.returncode == 0, told[-6000:]
    assert "run.rounds is 2 instead of 5" in told
    assert len(foretold(README)) > 8 and set(foretold(README)) <= set(masked(told))
    # What unlearning made is an adapter with a table, and no report.
    outs = [Path(words[words.index("--out") + 1]) for words in ALL if "--out" in words and words[0] != "unlearn"]
    made = [out for out in outs if not out.suffix and out.parts[0] == "runs"]
    made += ["runs/notes", "runs/script", "result"]
    assert all((tmp_path / folder / "report.html").is_file() for folder in made)


def named_tests(text):
    """Names of the tests that a text names in backticks."""
    return re.findall(r"`(test_\w+)`", text)


def test_every_test_that_the_table_of_adversaries_names_is_there():
    table = re.search(r"## Who can learn or break what\n(.*?)\n## ", DEPLOY.read_text(), re.DOTALL)
    rows = re.findall(r"^\| (?!who \||---)(.*) \|$", table.group(1), re.MULTILINE)
    assert len(rows) >= 8 and all(named_tests(row) for row in rows)
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert not set(named_tests(table.group(1))) - there
